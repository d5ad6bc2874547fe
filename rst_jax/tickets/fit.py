"""Whether what a file holds fits the network that it names: by shapes and types, before an array is read."""

import contextlib
import dataclasses
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, Any, TypeVar, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from msgspec import Meta

from rst_jax.config import Pattern
from rst_jax.models import ModelSpec
from rst_jax.subnet import is_kernel, score_shape
from rst_jax.tickets.ticket import Kind, Origin, Ticket

T = TypeVar("T")
Shape = tuple[int, ...]
Pixels = Annotated[int, Meta(ge=1, le=2**14)]
_ROOM, _TIMES = 2**29, 200  # bytes of weights that any file may hold; times its own size that a larger one may
_TYPES = {"floats": (np.float16, np.float32, np.float64), "bytes": (np.uint8,)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Told:
    """What a file says of a ticket besides its arrays; see `Ticket`.

    Attributes:
      meta: its origin; other entries, which earlier versions let callers add, are left out.
      digest: that it must have; "" where an earlier version did not say.
    """

    remaining_ratio: Annotated[float, Meta(gt=0, le=1)]
    meta: Origin
    kind: Kind | None = None
    format: Annotated[int, Meta(ge=1, le=2)] = 1
    digest: str = ""

    def check(self, ticket: Ticket) -> Ticket:
        """The ticket, whose digest is the one it must have.

        Raises:
          ValueError: it is not.
        """
        if ticket.digest != self.digest and (self.digest or self.format > 1):
            raise ValueError(f"damaged; its content's digest is {ticket.digest[:12]}, it says {self.digest[:12]!r}")
        return ticket


class Network:
    """The shapes of a network, without its arrays: what must be there, by paths such as "layer1_0/conv1/kernel".

    Args:
      model: by name and arguments, perhaps of somebody who wants it huge.
      image_shape: [H, W, C].
      size: bytes of its file. most: layers that are made; a file of so many arrays holds no more.

    Attributes:
      params, batch_stats, kernels: shapes.

    Raises:
      ValueError: there is no such network, or not in such a file.
    """

    def __init__(self, model: ModelSpec, image_shape: Shape, size: int, most: int):
        if len(model.mean) not in (1, image_shape[-1]):
            raise ValueError(f"its mean and std are of {len(model.mean)} channels, its images of {image_shape[-1]}")
        params, stats = _structs(model, image_shape, most)
        most = max(_ROOM, _TIMES * size) // 4
        if sum(math.prod(leaf.shape) for _, leaf in params) > most:
            raise ValueError(f"{size:,} bytes cannot hold its network, which has more than {most:,} weights")
        self.params, self.batch_stats = ({name: leaf.shape for name, leaf in tree} for tree in (params, stats))
        self.kernels = {
            name: leaf.shape for name, leaf in params if is_kernel((jax.tree_util.DictKey(name.split("/")[-1]),), leaf)
        }

    def check_masks(self, shapes: Mapping[str, Shape], kind: str) -> None:
        """Refuse masks of other layers, or of a shape that no pattern has; a dense network has none.

        Raises:
          ValueError: the layer is named.
        """
        same_names({} if kind == "dense" else self.kernels, shapes, "mask")
        for name, shape in shapes.items():
            of_patterns = [score_shape(self.kernels[name], pattern) for pattern in get_args(Pattern)]
            if shape not in of_patterns:
                raise ValueError(f"the mask of {name} is of {list(shape)}, its kernel of {list(self.kernels[name])}")


def same_names(wanted: Mapping[str, Any], found: Mapping[str, Any], what: str) -> None:
    """Refuse a name that is missing or left over.

    Raises:
      ValueError: it is named.
    """
    if missing := sorted(wanted.keys() - found.keys()):
        raise ValueError(f"the {what} of {missing[0]} is missing")
    if left := sorted(found.keys() - wanted.keys()):
        raise ValueError(f"there is no place for the {what} of {left[0]}")


def check_array(name: str, shape: Shape, dtype: np.dtype, wanted: Shape, what: str = "floats") -> None:
    """Refuse an array of another shape or type.

    Raises:
      ValueError: says what was expected, and what it is.
    """
    if tuple(shape) != wanted or dtype not in _TYPES[what]:
        raise ValueError(f"{name}: expected {what} {list(wanted)}; it is {dtype} {list(shape)}")


def check_finite(ticket: Ticket) -> None:
    """Refuse weights and statistics that are not finite, and variances below 0.

    Raises:
      ValueError: the layer is named.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(ticket.variables):
        if not np.isfinite(leaf).all() or (path[-1].key == "var" and (leaf < 0).any()):
            raise ValueError(f"{jax.tree_util.keystr(path)} is not finite, or a variance below 0")


def flat(tree: PyTree) -> list[tuple[str, Any]]:
    """The leaves of nested dicts by their paths: "layer1_0/conv1/kernel"."""
    return [("/".join(p.key for p in path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def nest(leaves: Mapping[str, T]) -> dict[str, Any]:
    """The inverse of `flat`."""
    tree: dict[str, Any] = {}
    for name, value in leaves.items():
        *folders, last = name.split("/")
        here = tree
        for folder in folders:
            here = here.setdefault(folder, {})
        here[last] = value
    return tree


@lru_cache(maxsize=64)
def _structs(model: ModelSpec, image_shape: Shape, most: int) -> tuple[list[tuple[str, Any]], list[tuple[str, Any]]]:
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    try:
        with _at_most(most):
            shapes = jax.eval_shape(lambda x: model.make().init(jax.random.key(0), x, train=False), images)
        params, stats = flat(shapes["params"]), flat(shapes.get("batch_stats", {}))
    except Exception as error:  # Flax and JAX raise many kinds for sizes that cannot be
        told = " ".join(str(error).split())[:200]
        raise ValueError(f"there is no network {model.name} of such arguments and images ({told})") from error
    return params, stats


def _at_most(layers: int) -> contextlib.AbstractContextManager[None]:
    """Within it, a module that makes more layers is stopped."""
    left = layers

    def count(following: Any, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        nonlocal left
        left -= context.method_name == "__call__"
        if left < 0:
            raise ValueError("it has more layers than the file has arrays")
        return following(*args, **kwargs)

    return nn.intercept_methods(count)
