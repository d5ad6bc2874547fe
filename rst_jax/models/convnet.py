"""Conv2/4/6/8 (Frankle and Carbin, 2019): pairs of 3x3 convolutions with max pooling, then three dense layers.

No batch norm. Features are flattened channels first, so that the released code's weights fit.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from rst_jax.models.layers import Network


def halve(x: jax.Array) -> jax.Array:
    """2x2 max pooling of [N, H, W, C]; a maximum over an axis differentiates faster than a window on a CPU."""
    n, h, w, c = x.shape
    windows = x[:, : h // 2 * 2, : w // 2 * 2].reshape(n, h // 2, 2, w // 2, 2, c)
    return jnp.max(windows, axis=(2, 4))


class ConvNet(Network):
    """Pairs of convolutions of the given channels.

    Attributes:
      widths: channels of each pair; the image is halved after each.
    """

    widths: tuple[int, ...] = (64, 128)

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Images [N, H, W, C] in [0, 1] to logits [N, num_classes]; `train` changes nothing here."""
        conv, _ = self.layers()
        x = self.normalise(images)
        for pair, channels in enumerate(self.widths):
            for place in (5 * pair, 5 * pair + 2):
                x = nn.relu(conv(self.channels(channels), 3, name=f"convs_{place}")(x))
            x = halve(x)
        if not x.size:
            raise ValueError(f"images of {images.shape[1:3]} pixels are too small to halve {len(self.widths)} times.")
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
        hidden = self.channels(256)
        for place, features in ((0, hidden), (2, hidden), (4, self.num_classes)):
            dtype = self.param_dtype if place == 4 else self.dtype
            dense = nn.Dense(
                features, use_bias=False, dtype=dtype, param_dtype=self.param_dtype, name=f"linear_{place}"
            )
            x = dense(x if place == 0 else nn.relu(x))
        return x


conv2 = partial(ConvNet, widths=(64,))
conv4 = partial(ConvNet, widths=(64, 128))
conv6 = partial(ConvNet, widths=(64, 128, 256))
conv8 = partial(ConvNet, widths=(64, 128, 256, 512))
