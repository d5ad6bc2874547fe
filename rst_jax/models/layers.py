"""What the networks share: PyTorch's batch normalisation and padding, input normalisation, the constructor fields."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax


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
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """x [..., channels] to the same shape and type."""
        channels = (x.shape[-1],)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, self.param_dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels, self.param_dtype)
        if not train:
            mean, var = running_mean.value, running_var.value
        else:
            axes = tuple(range(x.ndim - 1))
            wide = x.astype(self.param_dtype)
            mean = jnp.mean(wide, axes)
            count = x.size // x.shape[-1]
            if self.axis_name and not self.is_initializing():
                mean = lax.pmean(mean, self.axis_name)
                count *= lax.axis_size(self.axis_name)
            var = jnp.mean(jnp.square(wide - mean), axes)
            if self.axis_name and not self.is_initializing():
                var = lax.pmean(var, self.axis_name)
            if not self.is_initializing():
                unbiased = var * (count / max(count - 1, 1))
                running_mean.value = self.momentum * running_mean.value + (1 - self.momentum) * mean
                running_var.value = self.momentum * running_var.value + (1 - self.momentum) * unbiased
        scale = lax.rsqrt(var + self.epsilon)
        return ((x.astype(self.param_dtype) - mean) * scale).astype(x.dtype)


class Network(nn.Module):
    """The fields and the small parts that every network here has."""

    num_classes: int = 10
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    bn_axis: str | None = None

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


def conv(features: int, size: int, stride: int, owner: Any, name: str) -> nn.Conv:
    """A bias-free convolution with PyTorch's padding: explicit, symmetric, (size - 1) / 2 on each side."""
    return nn.Conv(
        features,
        (size, size),
        (stride, stride),
        padding=size // 2,
        use_bias=False,
        dtype=owner.dtype,
        param_dtype=owner.param_dtype,
        name=name,
    )


def batch_norm(owner: Any, name: str) -> BatchNorm:
    """Batch normalisation with the owner's statistics type and axis."""
    return BatchNorm(axis_name=owner.bn_axis, param_dtype=owner.param_dtype, name=name)
