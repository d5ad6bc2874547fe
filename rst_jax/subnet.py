"""Masks over parameter trees: patterns, the exact top-k mask, the straight-through gradient.

A ticket is `weights = params * mask(scores)`. Scores live beside the parameters, in a tree of their own
with one leaf for each kernel (a leaf named "kernel" of two or more axes, channels last: HWIO or IO). A
score's shape is the kernel's with the axes that share it reduced to 1, so that masks broadcast.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int, PyTree

from rst_jax.config import Pattern


def is_kernel(path: tuple, leaf: PyTree) -> bool:
    """Whether a parameter leaf is searched: named "kernel" and of two or more axes."""
    return getattr(path[-1], "key", None) == "kernel" and len(leaf.shape) >= 2


def score_shape(kernel_shape: tuple[int, ...], pattern: Pattern) -> tuple[int, ...]:
    """Shape of the scores of a kernel [..., in, out]: 1 where weights share a score.

    element: one score a weight. row: one for each (height, in, out) of an HWIO kernel. kernel: one for each
    (in, out). filter: one for each out. In a dense kernel [in, out] rows and kernels are single weights.
    """
    *window, inputs, outputs = kernel_shape
    if pattern == "element":
        return tuple(kernel_shape)
    if pattern == "row":
        return (*window[:-1], *(1 for _ in window[-1:]), inputs, outputs)
    if pattern == "kernel":
        return (*(1 for _ in window), inputs, outputs)
    if pattern == "filter":
        return (*(1 for _ in window), 1, outputs)
    raise ValueError(f"pattern must be element, row, kernel or filter; got {pattern!r}.")


def kept_count(n: int, remaining_ratio: float) -> int:
    """How many of n scores stay: n - int((1 - ratio) * n), in float64 as the released code counts."""
    return n - int((1 - remaining_ratio) * n)


def kept_counts(scores: PyTree, remaining_ratio: float) -> PyTree:
    """The kept count of every layer (int32 scalars in the scores' tree): arguments of the step, not constants.

    Raises:
      ValueError: a layer would keep nothing; the layer is named.
    """
    if not 0 < remaining_ratio <= 1:
        raise ValueError(f"remaining ratio must be in (0, 1]; got {remaining_ratio}.")

    def count(path: tuple, leaf: PyTree) -> np.ndarray:
        kept = kept_count(leaf.size, remaining_ratio)
        if kept < 1:
            raise ValueError(
                f"{jax.tree_util.keystr(path)}: remaining ratio {remaining_ratio} keeps none of {leaf.size} scores; "
                "take a larger one."
            )
        return np.asarray(kept, np.int32)

    return jax.tree_util.tree_map_with_path(count, scores)


def _counts(conditions: Sequence[Bool[jax.Array, "*scores"]]) -> Int[jax.Array, " conditions"]:
    """How often each of several conditions of one shape holds, in one reduction."""
    ones = tuple(condition.astype(jnp.int32) for condition in conditions)
    zeros = tuple(jnp.zeros((), jnp.int32) for _ in conditions)
    return jnp.stack(lax.reduce(ones, zeros, lambda a, b: tuple(map(jnp.add, a, b)), tuple(range(ones[0].ndim))))


def _kth_largest(keys: Callable[[], list[jax.Array]], k: Int[jax.Array, " layers"], bits: int) -> jax.Array:
    """Of each layer the largest t with at least k keys >= t, found four bits at a time, without a sort: [layers].

    Each pass counts the keys above fifteen candidates in one reduction, about as fast as a sum for one, so that the
    keys are read a quarter as often. `keys` are made anew in every pass, so that none lie in memory.
    """
    kind, passes = keys()[0].dtype, -(-bits // 4)

    def settle(i: jax.Array, t: jax.Array) -> jax.Array:
        shift = (4 * (passes - 1 - i)).astype(kind)
        tried = t | (jnp.arange(1, 16, dtype=kind)[:, None] << shift)
        counts = [_counts([layer >= tried[d, place] for d in range(15)]) for place, layer in enumerate(keys())]
        return t | (jnp.sum(jnp.stack(counts, 1) >= k, 0, dtype=kind) << shift)

    return lax.fori_loop(0, passes, settle, jnp.zeros(k.shape, kind))


def _index(shape: tuple[int, ...]) -> jax.Array:
    """Place of each score in the released code's order: OIHW for a kernel HWIO, C order for one axis."""
    major_first = (len(shape) - 1, len(shape) - 2, *range(len(shape) - 2)) if len(shape) > 1 else (0,)
    index = jnp.zeros(shape, jnp.uint32)
    for axis in major_first:
        index = index * jnp.uint32(shape[axis]) + lax.broadcasted_iota(jnp.uint32, shape, axis)
    return index


def top_k_mask(scores: Float[jax.Array, "*scores"], kept: jax.Array | np.ndarray | int) -> Bool[jax.Array, "*scores"]:
    """Boolean mask of exactly `kept` scores: the largest |score|; among equals the later index wins.

    The index counts in the released code's order (out, in, height, width). `kept` may be traced, so one
    program serves every remaining ratio. The threshold is found over the float's integer view, whose order is
    the magnitude's.
    """
    return _top_k_masks([scores], [jnp.asarray(kept, jnp.int32)])[0]


def _top_k_masks(scores: Sequence[jax.Array], kept: Sequence[jax.Array]) -> list[jax.Array]:
    """`top_k_mask` of several layers of one type; all take part in each pass."""
    k, width = jnp.stack(kept), jnp.finfo(scores[0].dtype).bits

    def magnitudes() -> list[jax.Array]:
        return [lax.bitcast_convert_type(jnp.abs(layer), jnp.dtype(f"uint{width}")) for layer in scores]

    threshold = _kth_largest(magnitudes, k, width - 1)
    keys = list(zip(magnitudes(), threshold, strict=True))
    above, reached = jnp.stack([_counts([key > t, key >= t]) for key, t in keys], 1)

    def ranks() -> list[jax.Array]:
        """Of those at the threshold, from 1 on; 0 for the others."""
        one = jnp.ones((), jnp.uint32)
        return [jnp.where(key == t, _index(key.shape) + one, one - one) for key, t in keys]

    def cut_ties() -> jax.Array:
        return _kth_largest(ranks, k - above, max(layer.size for layer in scores).bit_length())

    first = lax.cond((reached == k).all(), lambda: jnp.ones(k.shape, jnp.uint32), cut_ties)
    return [
        ((key > t) | (rank >= least)) & (n > 0)
        for (key, t), rank, least, n in zip(keys, ranks(), first, k, strict=True)
    ]


@jax.custom_vjp
def straight_through(
    weights: Float[jax.Array, "*weights"], scores: Float[jax.Array, "*scores"], mask: Bool[jax.Array, "*scores"]
) -> Float[jax.Array, "*weights"]:
    """weights * mask, with edge-popup's straight-through gradient for the scores (Ramanujan et al., 2020).

    d loss / d score = sign(score) * sum over the score's group of (d loss / d weight * weight), for every score,
    kept or not; d loss / d weight passes through the mask.
    """
    return weights * mask.astype(weights.dtype)


def _forward(weights: jax.Array, scores: jax.Array, mask: jax.Array) -> tuple[jax.Array, tuple]:
    return weights * mask.astype(weights.dtype), (weights, scores, mask)


def _backward(residuals: tuple, g: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    weights, scores, mask = residuals
    shared = tuple(axis for axis, n in enumerate(scores.shape) if n != weights.shape[axis])
    group = jnp.sum(g * weights, axis=shared, keepdims=True)
    return g * mask.astype(g.dtype), jnp.sign(scores) * group.astype(scores.dtype), None


straight_through.defvjp(_forward, _backward)


def masks(scores: PyTree, kept: PyTree) -> PyTree:
    """The boolean mask of every layer, in the scores' tree and shapes; `kept` as from `kept_counts`."""
    leaves, tree = jax.tree.flatten(scores)
    return jax.tree.unflatten(tree, _top_k_masks(leaves, [jnp.asarray(k, jnp.int32) for k in jax.tree.leaves(kept)]))


def materialise(params: PyTree, scores: PyTree, made: PyTree) -> PyTree:
    """The subnetwork's weights, whose gradient reaches the scores straight through the masks `made` from them.

    Parameters without scores are passed on as they are.
    """
    return _at_kernels(straight_through, params, scores, made)


def apply_masks(params: PyTree, fixed: PyTree) -> PyTree:
    """params * mask for masks that are not being searched; parameters without a mask stay as they are."""
    return _at_kernels(lambda weight, mask: weight * mask.astype(weight.dtype), params, fixed)


def _at_kernels(combine: Callable[..., jax.Array], params: PyTree, *trees: PyTree) -> PyTree:
    if not isinstance(params, dict):
        return combine(params, *trees)
    return {
        name: _at_kernels(combine, value, *(tree[name] for tree in trees)) if name in trees[0] else value
        for name, value in params.items()
    }


def pack(mask: PyTree) -> PyTree:
    """Masks as bytes, eight to a byte, most significant bit first, in C order."""
    return jax.tree.map(lambda m: np.packbits(np.asarray(m, bool).reshape(-1)), mask)


def unpack(packed: PyTree, shapes: PyTree) -> PyTree:
    """The inverse of `pack`; `shapes` is a tree of arrays or ShapeDtypeStructs of the masks' shapes."""
    return jax.tree.map(
        lambda p, s: np.unpackbits(np.asarray(p), count=int(np.prod(s.shape))).astype(bool).reshape(s.shape),
        packed,
        shapes,
    )


def kernels(params: PyTree) -> PyTree:
    """The subtree of the kernels alone.

    Raises:
      ValueError: there is none.
    """

    def visit(tree: PyTree) -> PyTree:
        found = {name: visit(value) if isinstance(value, dict) else value for name, value in tree.items()}
        return {
            name: value
            for name, value in found.items()
            if (value if isinstance(value, dict) else is_kernel((jax.tree_util.DictKey(name),), value))
        }

    found = visit(params)
    if not found:
        raise ValueError("the model has no kernel to mask: expected parameters named 'kernel' of two or more axes.")
    return found


def score_structs(params: PyTree, pattern: Pattern, dtype: DTypeLike = jnp.float32) -> PyTree:
    """ShapeDtypeStructs of the scores of every kernel in `params`."""
    return jax.tree.map(lambda k: jax.ShapeDtypeStruct(score_shape(k.shape, pattern), dtype), kernels(params))
