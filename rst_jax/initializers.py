"""The network that nobody trained: distributions of the frozen weights and of the scores.

The fan of a weight is height * width * in; the gain is sqrt(2) unless named otherwise. Every layer is sampled from
a key of its own, folded from its path, so a layer's weights do not depend on the layers around it.
"""

import math
import zlib
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import PyTree

from rst_jax.config import Pattern
from rst_jax.subnet import is_kernel, score_structs

Sampler = Callable[[jax.Array, tuple[int, ...], float, DTypeLike], jax.Array]
_GAIN = math.sqrt(2.0)


def _fans(shape: tuple[int, ...]) -> tuple[int, int]:
    window = math.prod(shape[:-2])
    return window * shape[-2], window * shape[-1]


def signed_kaiming_constant(key: jax.Array, shape: tuple[int, ...], fan_scale: float, dtype: DTypeLike) -> jax.Array:
    """+-sqrt(2 / fan_in), the sign at random (Ramanujan et al., 2020); the paper's default."""
    std = _GAIN / math.sqrt(_fans(shape)[0] * fan_scale)
    return std * jax.random.rademacher(key, shape, dtype)


def unsigned_constant(key: jax.Array, shape: tuple[int, ...], fan_scale: float, dtype: DTypeLike) -> jax.Array:
    """sqrt(2 / fan_in) everywhere."""
    return jnp.full(shape, _GAIN / math.sqrt(_fans(shape)[0] * fan_scale), dtype)


def kaiming_normal(key: jax.Array, shape: tuple[int, ...], fan_scale: float, dtype: DTypeLike) -> jax.Array:
    """N(0, 2 / fan_in) (He et al., 2015)."""
    return _GAIN / math.sqrt(_fans(shape)[0] * fan_scale) * jax.random.normal(key, shape, dtype)


def kaiming_uniform(key: jax.Array, shape: tuple[int, ...], fan_scale: float, dtype: DTypeLike) -> jax.Array:
    """U(+-sqrt(6 / fan_in)) (He et al., 2015)."""
    bound = _GAIN * math.sqrt(3 / (_fans(shape)[0] * fan_scale))
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def _xavier_std(shape: tuple[int, ...], fan_scale: float) -> float:
    return math.sqrt(2 / (sum(_fans(shape)) * fan_scale))


def xavier_normal(key: jax.Array, shape: tuple[int, ...], fan_scale: float, dtype: DTypeLike) -> jax.Array:
    """N(0, 2 / (fan_in + fan_out)) (Glorot and Bengio, 2010)."""
    return _xavier_std(shape, fan_scale) * jax.random.normal(key, shape, dtype)


def xavier_constant(key: jax.Array, shape: tuple[int, ...], fan_scale: float, dtype: DTypeLike) -> jax.Array:
    """+-sqrt(2 / (fan_in + fan_out)), the sign at random."""
    return _xavier_std(shape, fan_scale) * jax.random.rademacher(key, shape, dtype)


def torch_default(key: jax.Array, shape: tuple[int, ...], fan_scale: float, dtype: DTypeLike) -> jax.Array:
    """U(+-1 / sqrt(fan_in)), what PyTorch's layers start from."""
    bound = 1 / math.sqrt(_fans(shape)[0] * fan_scale)
    return jax.random.uniform(key, shape, dtype, -bound, bound)


WEIGHTS: dict[str, Sampler] = {
    "signed_kaiming_constant": signed_kaiming_constant,
    "unsigned_constant": unsigned_constant,
    "kaiming_normal": kaiming_normal,
    "kaiming_uniform": kaiming_uniform,
    "xavier_normal": xavier_normal,
    "xavier_constant": xavier_constant,
    "torch_default": torch_default,
}


def _layer_key(key: jax.Array, path: tuple) -> jax.Array:
    return jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))


def sample_weights(key: jax.Array, params: PyTree, name: str, fan_scale: float = 1.0) -> PyTree:
    """`params` (arrays or shapes) with every kernel sampled anew from the distribution `name`; other leaves stay.

    Args:
      key: a PRNG key.
      params: a tree of parameters.
      name: a key of `WEIGHTS`.
      fan_scale: the remaining ratio under `scale_fan`, else 1.

    Raises:
      ValueError: an unknown name.
    """
    if name not in WEIGHTS:
        raise ValueError(f"weight_init must be one of {', '.join(WEIGHTS)}; got {name!r}.")

    def sample(path: tuple, leaf: PyTree) -> PyTree:
        if not is_kernel(path, leaf):
            return leaf
        return WEIGHTS[name](_layer_key(key, path), tuple(leaf.shape), fan_scale, leaf.dtype)

    return jax.tree_util.tree_map_with_path(sample, params)


def sample_scores(key: jax.Array, params: PyTree, pattern: Pattern, dtype: DTypeLike = jnp.float32) -> PyTree:
    """Scores of every kernel: U(+-1/sqrt(fan)), the fan that of the score's own shape; filter: N(0, 1).

    The fan of an element is in * height * width, of a row in * height, of a kernel in (paper's released code).
    """

    def sample(path: tuple, struct: jax.ShapeDtypeStruct) -> jax.Array:
        layer_key = _layer_key(key, path)
        if pattern == "filter":
            return jax.random.normal(layer_key, struct.shape, struct.dtype)
        bound = 1 / math.sqrt(math.prod(struct.shape[:-1]))
        return jax.random.uniform(layer_key, struct.shape, struct.dtype, -bound, bound)

    return jax.tree_util.tree_map_with_path(sample, score_structs(params, pattern, dtype))


def init_variables(
    model: nn.Module,
    image_shape: tuple[int, ...],
    key: jax.Array,
    *,
    pattern: Pattern = "element",
    weight_init: str = "signed_kaiming_constant",
    fan_scale: float = 1.0,
) -> dict[str, PyTree]:
    """The three collections of a network that nobody trained: params, scores, batch_stats.

    Kernels and scores are sampled from keys of their own layers; other parameters are the module's.

    Args:
      model: any Flax module with a `train` argument.
      image_shape: [H, W, C].
      key: a PRNG key.
      pattern, weight_init: as in the configuration.
      fan_scale: the remaining ratio under `scale_fan`, else 1.
    """
    images = jnp.zeros((1, *image_shape))
    shapes = jax.eval_shape(lambda k: model.init(k, images, train=False), key)

    def rest(k: jax.Array) -> PyTree:
        """What the module sets itself; XLA drops the kernels' own initialisation."""
        made = model.init(k, images, train=False)
        others = jax.tree_util.tree_map_with_path(
            lambda path, leaf: None if is_kernel(path, leaf) else leaf, made["params"]
        )
        return others, made.get("batch_stats", {})

    def everything(k: jax.Array) -> dict[str, PyTree]:
        others, batch_stats = rest(k)
        params = jax.tree.map(
            lambda own, struct: struct if own is None else own,
            others,
            shapes["params"],
            is_leaf=lambda x: x is None,
        )
        weight_key, score_key = jax.random.split(k)
        dtype = jax.tree.leaves(shapes["params"])[0].dtype
        return {
            "params": sample_weights(weight_key, params, weight_init, fan_scale),
            "scores": sample_scores(score_key, shapes["params"], pattern, dtype),
            "batch_stats": batch_stats,
        }

    return jax.jit(everything)(key)
