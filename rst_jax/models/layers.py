"""What the networks share: PyTorch's batch normalisation and padding, input normalisation, the constructor fields.

A network makes its layers by `conv(features, size, stride, name=...)` and `norm(name=...)`, which know its types and
its mesh axis (`Network.layers`), and hands both to its blocks.
"""

import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import PyTree

Layer = Callable[..., nn.Module]


class BatchNorm(nn.Module):
    """Batch normalisation without affine parameters, with PyTorch's statistics.

    Batches are normalised by their biased variance; the running variance is the unbiased one. The running
    statistics ("batch_stats": mean, var) keep `momentum` of the old value. Statistics are at least float32.

    Attributes:
      momentum: PyTorch's 0.1 is 0.9 here.
      axis_name: a mesh axis over which the batch statistics are averaged; None keeps them on each device.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    axis_name: str | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """x [..., channels] to the same shape and type."""
        channels = (x.shape[-1],)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, self.param_dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels, self.param_dtype)
        if not train:
            scale = lax.rsqrt(running_var.value + self.epsilon)
            return ((x.astype(self.param_dtype) - running_mean.value) * scale).astype(x.dtype)
        axis = None if self.is_initializing() else self.axis_name
        y, mean, var = normalised(x, running_mean.value, self.epsilon, axis)
        if not self.is_initializing():
            count = x.size // x.shape[-1] * (lax.axis_size(axis) if axis else 1)
            unbiased = var * (count / max(count - 1, 1))
            running_mean.value = self.momentum * running_mean.value + (1 - self.momentum) * mean
            running_var.value = self.momentum * running_var.value + (1 - self.momentum) * unbiased
        return y


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def normalised(x: jax.Array, shift: jax.Array, epsilon: float, axis_name: str | None) -> tuple[jax.Array, ...]:
    """x [..., channels], each channel less its mean and over its deviation; and both, in shift's type.

    One pass over x gives them, as the sums of x - shift and of its square, and one the gradient (Ioffe and Szegedy,
    2015) with its sums written out: scale (dy - mean(dy) - y mean(dy y)). None goes through mean and variance.

    Args:
      x: of any float type; all is computed in shift's.
      shift: [channels], near the mean. Of a channel whose mean is k deviations away from it, k^2 roundings are lost of
        the variance; `BatchNorm` gives the running mean.
      epsilon: added to the variance.
      axis_name: a mesh axis over which the means are taken.
    """
    return _forward(x, shift, epsilon, axis_name)[0]


def _forward(
    x: jax.Array, shift: jax.Array, epsilon: float, axis_name: str | None
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    wide = x.astype(shift.dtype)
    first, second = _means(wide - shift, jnp.square(wide - shift), axis_name)
    mean, var = shift + first, jnp.maximum(second - jnp.square(first), 0)
    scale = lax.rsqrt(var + epsilon)
    return (((wide - mean) * scale).astype(x.dtype), mean, var), (x, mean, scale)


def _backward(
    epsilon: float, axis_name: str | None, kept: tuple[jax.Array, ...], g: tuple[jax.Array, ...]
) -> tuple[jax.Array, None]:
    x, mean, scale = kept
    dy, y = g[0].astype(mean.dtype), (x.astype(mean.dtype) - mean) * scale
    first, second = _means(dy, dy * y, axis_name)
    return (scale * (dy - first - y * second)).astype(x.dtype), None


normalised.defvjp(_forward, _backward)


def _means(a: jax.Array, b: jax.Array, axis_name: str | None) -> tuple[jax.Array, jax.Array]:
    """Of both [..., channels] the mean of each channel, over the mesh axis too.

    On a GPU both come from one reduction, which reads once what they are made of; on a TPU two reductions ride on the
    convolution before them, and one does not.
    """
    count = a.size // a.shape[-1]
    first, second = lax.platform_dependent(a, b, cuda=_sums_together, default=_sums_apart)
    first, second = first / count, second / count
    return lax.pmean((first, second), axis_name) if axis_name else (first, second)


def _sums_apart(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    axes = tuple(range(a.ndim - 1))
    return a.sum(axes), b.sum(axes)


# XLA's reductions on a GPU take the rows in parts, but not so few rows: then the parts are the images.
_FEW_ROWS = 4096


def _sums_together(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    last, zero = a.ndim - 1, jnp.zeros((), a.dtype)
    few = last > 1 and a.size // a.shape[-1] <= _FEW_ROWS
    for axes in (tuple(range(1, last)), (0,)) if few else (tuple(range(last)),):
        a, b = lax.reduce((a, b), (zero, zero), lambda x, y: (x[0] + y[0], x[1] + y[1]), axes)
    return a, b


@jax.custom_vjp
def joined(x: jax.Array, y: jax.Array) -> jax.Array:
    """relu(x + y), the end of a residual block; its gradient looks at what came out, which is in memory anyway."""
    return nn.relu(x + y)


def _join(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    out = nn.relu(x + y)
    return out, lax.optimization_barrier(out)  # or XLA finds it again from x and y, and reads both


def _part(out: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    g = jnp.where(out > 0, g, jnp.zeros((), g.dtype))
    return g, g


joined.defvjp(_join, _part)


class Network(nn.Module):
    """The fields and the small parts that every network here has.

    Attributes:
      width: how many times the usual channels every layer has; the input and the classes stay.
    """

    num_classes: int = 10
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    width: float = 1.0
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    bn_axis: str | None = None
    remat: bool = False

    def layers(self) -> tuple[Layer, Layer]:
        """`conv` and `norm` in the network's types."""
        return (
            partial(conv, dtype=self.dtype, param_dtype=self.param_dtype),
            partial(BatchNorm, axis_name=self.bn_axis, param_dtype=self.param_dtype),
        )

    def channels(self, usual: int) -> int:
        """The channels of a layer that has `usual` ones at width 1: rounded, and at least one.

        Raises:
          ValueError: the width is not positive.
        """
        if not self.width > 0:
            raise ValueError(f"width must be positive, 1 for the usual channels; got {self.width}.")
        return max(1, round(self.width * usual))

    def block(self, kind: type[nn.Module]) -> type[nn.Module]:
        """A block's class, called as block(x, train); with `remat` its activations are computed again when needed."""
        return nn.remat(kind, static_argnums=(2,)) if self.remat else kind

    def normalise(self, images: jax.Array) -> jax.Array:
        """[0, 1] images to what the first layer sees, in the computation's type."""
        mean, std = (jnp.asarray(v, self.param_dtype) for v in (self.mean, self.std))
        return ((images.astype(self.param_dtype) - mean) / std).astype(self.dtype)

    def logits(self, features: jax.Array) -> jax.Array:
        """The bias-free head on the mean over the pixels of [N, H, W, C], in the parameters' type."""
        head = nn.Dense(
            self.num_classes, use_bias=False, dtype=self.param_dtype, param_dtype=self.param_dtype, name="fc"
        )
        return head(jnp.mean(features.astype(self.param_dtype), axis=(1, 2)))


def conv(features: int, size: int, stride: int = 1, **options: Any) -> nn.Conv:
    """A bias-free convolution with PyTorch's padding: explicit, symmetric, (size - 1) / 2 on each side.

    Args:
      options: of `nn.Conv`: dtype, param_dtype, name.
    """
    window, strides = (size, size), (stride, stride)
    return nn.Conv(features, window, strides, size // 2, use_bias=False, conv_general_dilated=convolve, **options)


# XLA's CPU kernels share a convolution among threads by blocks of output channels, as many as give a block of the
# kernel so many elements; a kernel below that runs on one thread.
_ONE_THREAD_BELOW = 73_728
_WORTH_A_THREAD = 2**28  # multiply-adds


def convolve(x: jax.Array, kernel: jax.Array, *args: PyTree, **options: Any) -> jax.Array:
    """`lax.conv_general_dilated` [N, ...]; on a CPU a large convolution of few channels runs in parts of the batch.

    The parts, and with them both gradients, run on a core each; no image's result changes.
    """
    whole: Any = partial(lax.conv_general_dilated, **options)
    cores = min(os.cpu_count() or 1, 8)
    window_and_inputs = math.prod(kernel.shape[:-1])
    work = math.prod(x.shape[:-1]) * window_and_inputs * kernel.shape[-1]
    if kernel.size > _ONE_THREAD_BELOW or work < _WORTH_A_THREAD or x.shape[0] % cores:
        return whole(x, kernel, *args)

    def in_parts(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.concatenate([whole(part, kernel, *args) for part in jnp.split(x, cores)])

    return lax.platform_dependent(x, kernel, cpu=in_parts, default=lambda x, k: whole(x, k, *args))
