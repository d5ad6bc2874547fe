"""Wide ResNet (Zagoruyko and Komodakis, 2016; pre-activation), as in the paper's released code.

Where a block changes the shape, the shortcut is a 1x1 convolution without batch norm, fed by relu(bn(x)).
"""

from functools import partial

import flax.linen as nn
import jax

from rst_jax.models.layers import Layer, Network


class Block(nn.Module):
    """bn, relu, 3x3, bn, relu, 3x3, plus the shortcut."""

    channels: int
    stride: int
    conv: Layer
    norm: Layer

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """x [N, H, W, C] to [N, H / stride, W / stride, channels]."""
        y = nn.relu(self.norm(name="bn1")(x, train))
        if self.stride != 1 or x.shape[-1] != self.channels:
            x = self.conv(self.channels, 1, self.stride, name="convShortcut")(y)
        y = self.conv(self.channels, 3, self.stride, name="conv1")(y)
        y = nn.relu(self.norm(name="bn2")(y, train))
        return x + self.conv(self.channels, 3, name="conv2")(y)


class WideResNet(Network):
    """WRN-depth-widen.

    Attributes:
      depth: 6 n + 4 layers, n blocks a stage.
      widen: the stages have 16, 32 and 64 times as many channels.
    """

    depth: int = 34
    widen: int = 10

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Images [N, H, W, C] in [0, 1] to logits [N, num_classes]."""
        count, rest = divmod(self.depth - 4, 6)
        if rest or count < 1:
            raise ValueError(f"depth must be 6 n + 4 for a whole n of at least 1; got {self.depth}.")
        conv, norm = self.layers()
        x = conv(self.channels(16), 3, name="conv1")(self.normalise(images))
        for stage in (1, 2, 3):
            channels = self.channels(16 * 2 ** (stage - 1) * self.widen)
            for i in range(count):
                stride = 2 if i == 0 and stage > 1 else 1
                x = self.block(Block)(channels, stride, conv, norm, name=f"block{stage}_layer_{i}")(x, train)
        x = nn.relu(norm(name="bn1")(x, train))
        return self.logits(x)


wrn10_1 = partial(WideResNet, depth=10, widen=1)
wrn28_10 = partial(WideResNet, depth=28, widen=10)
wrn34_10 = partial(WideResNet, depth=34, widen=10)
