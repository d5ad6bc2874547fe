"""Losses and correctness, one value an example: [N, classes] logits and [N] integer labels to [N].

Margins, correctness and single logits are NumPy's where the logits are; losses are JAX's.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Bool, Float, Int

Array = Any  # NumPy's or JAX's
Logits = Float[Array, "n classes"]
Labels = Int[Array, " n"]


def cross_entropy(logits: Logits, labels: Labels, smoothing: float = 0.0) -> Float[jax.Array, " n"]:
    """-sum_c q_c log softmax(logits)_c, q = (1 - smoothing) on the label + smoothing spread over all classes."""
    log_p = jax.nn.log_softmax(logits)
    at_label = at(log_p, labels)
    if not smoothing:
        return -at_label
    return -((1 - smoothing) * at_label + smoothing * jnp.mean(log_p, axis=-1))


def margin(logits: Logits, labels: Labels) -> Float[Array, " n"]:
    """z_y - max_{i != y} z_i: how far the label's logit is above the next; negative where it is not the largest."""
    others = logits.__array_namespace__().where(one_hot(labels, logits), logits.dtype.type(-np.inf), logits)
    with np.errstate(invalid="ignore"):  # inf - inf
        return at(logits, labels) - others.max(-1)


def dlr(logits: Logits, labels: Labels) -> Float[jax.Array, " n"]:
    """Difference of logits ratio (Croce and Hein, 2020, eq. 6): -margin / (z_1 - z_3), over descending logits.

    It is the same for shifted and scaled logits. With two classes there is no third: -margin.
    """
    if logits.shape[-1] < 3:
        return -margin(logits, labels)
    return -margin(logits, labels) / (weighed(logits, (1, 0, -1)) + 1e-12)


def targeted_dlr(logits: Logits, labels: Labels, targets: Labels) -> Float[jax.Array, " n"]:
    """Targeted DLR (Croce and Hein, 2020, eq. 7): -(z_y - z_t) / (z_1 - (z_3 + z_4) / 2), over descending logits.

    With fewer than four classes there is no fourth: z_t - z_y.
    """
    ahead = at(logits, targets) - at(logits, labels)
    if logits.shape[-1] < 4:
        return ahead
    return ahead / (weighed(logits, (1, 0, -0.5, -0.5)) + 1e-12)


def at(logits: Logits, classes: Labels) -> Float[Array, " n"]:
    """The logit of one class an example: [N] of [N, classes] and integers [N]."""
    return logits.__array_namespace__().where(one_hot(classes, logits), logits, logits.dtype.type(0)).sum(-1)


def one_hot(classes: Labels, logits: Logits) -> Bool[Array, "n classes"]:
    """Which logit is the class's: bool [N, classes] of integers [N]."""
    return classes[:, None] == np.arange(logits.shape[-1], dtype=classes.dtype)


def weighed(logits: Logits, weights: Sequence[float]) -> Float[jax.Array, " n"]:
    """sum_k w_k z_k over the largest logits in descending order, [N]; of equals, the first is the larger."""
    _, top = lax.top_k(lax.stop_gradient(logits), len(weights))
    chosen = top[..., None] == jnp.arange(logits.shape[-1], dtype=top.dtype)
    share = jnp.sum(jnp.where(chosen, jnp.asarray(weights, logits.dtype)[:, None], 0), axis=1)
    return jnp.sum(jnp.where(share == 0, 0, share * logits), axis=-1)


def correct(logits: Logits, labels: Labels) -> Bool[Array, " n"]:
    """Whether the largest logit (the first of equals) is the label's: bool [N]; what is not finite is never right."""
    return (logits.argmax(-1).astype(labels.dtype) == labels) & logits.__array_namespace__().isfinite(logits).all(-1)
