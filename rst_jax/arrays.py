"""Arrays of examples [N, ...], NumPy's on the host or JAX's in programs: what works on both by the same lines."""

from typing import Any

import jax.numpy as jnp
import numpy as np

Array = Any  # NumPy's or JAX's; a result is of the kind of the arguments


def numpy_of(x: Array) -> Any:
    """The module whose functions take x: NumPy, or JAX's version of it."""
    return np if isinstance(x, np.ndarray | np.generic) else jnp


def per_example(values: Array, like: Array) -> Array:
    """[N] as [N, 1, ...], to go with an array [N, ...]."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))


def l2_norm(x: Array) -> Array:
    """The Euclidean norm of each example: [N] of [N, ...]."""
    return numpy_of(x).sqrt((x * x).sum(axis=pixels(x)))


def pixels(x: Array) -> tuple[int, ...]:
    """The axes of [N, ...] but the first; on a CPU, sums over them all are quicker than over one long axis."""
    return tuple(range(1, x.ndim))
