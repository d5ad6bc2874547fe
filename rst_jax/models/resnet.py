"""ResNet (He et al., 2016; post-activation, as in the paper's released code), for small images and for ImageNet.

3x3 stem (ImageNet: 7x7 with stride 2, then 3x3 max pooling with stride 2), stages of 64/128/256/512 channels, 1x1
convolution + batch norm on the shortcut where shapes change, mean over the remaining pixels, bias-free head. The
stride of a bottleneck is on its 3x3. Wide ResNet-50-2 and -101-2 (Zagoruyko and Komodakis, 2016) have twice the
channels inside their bottlenecks.
"""

from functools import partial

import flax.linen as nn
import jax

from rst_jax.models.layers import Layer, Network, joined


class Block(nn.Module):
    """A residual block: two 3x3 convolutions, or 1x1, 3x3, 1x1 with four times the channels at the end."""

    channels: int
    stride: int
    bottleneck: bool
    inner: int
    shortcut: str
    conv: Layer
    norm: Layer

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """x [N, H, W, C] to [N, H / stride, W / stride, channels (* 4)]."""
        out = self.channels * (4 if self.bottleneck else 1)
        inner = self.channels * self.inner
        plan = (
            [(inner, 1, 1), (inner, 3, self.stride), (out, 1, 1)]
            if self.bottleneck
            else [(self.channels, 3, self.stride), (out, 3, 1)]
        )
        y = x
        for i, (channels, size, stride) in enumerate(plan, 1):
            y = self.conv(channels, size, stride, name=f"conv{i}")(y)
            y = self.norm(name=f"bn{i}")(y, train)
            if i < len(plan):
                y = nn.relu(y)
        if self.stride != 1 or x.shape[-1] != out:
            x = self.conv(out, 1, self.stride, name=f"{self.shortcut}_0")(x)
            x = self.norm(name=f"{self.shortcut}_1")(x, train)
        return joined(x, y)


class ResNet(Network):
    """A stem and stages of residual blocks; the first block of each stage but the first halves the image.

    Attributes:
      blocks: residual blocks a stage.
      widths: channels a stage; the stem has the first.
      stem_stride: 2 halves small images at once.
      bottleneck: three-layer blocks (ResNet-50 and deeper).
      inner: how many times the width a bottleneck has inside.
      imagenet: the stem for large images.
    """

    blocks: tuple[int, ...] = (2, 2, 2, 2)
    widths: tuple[int, ...] = (64, 128, 256, 512)
    stem_stride: int = 1
    bottleneck: bool = False
    inner: int = 1
    imagenet: bool = False

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Images [N, H, W, C] in [0, 1] to logits [N, num_classes]."""
        conv, norm = self.layers()
        size, stride = (7, 2) if self.imagenet else (3, self.stem_stride)
        x = conv(self.channels(self.widths[0]), size, stride, name="conv1")(self.normalise(images))
        x = nn.relu(norm(name="bn1")(x, train))
        if self.imagenet:
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        block = partial(
            self.block(Block),
            bottleneck=self.bottleneck,
            inner=self.inner,
            shortcut="downsample" if self.imagenet else "shortcut",
            conv=conv,
            norm=norm,
        )
        for stage, (count, channels) in enumerate(zip(self.blocks, self.widths, strict=True), 1):
            for i in range(count):
                stride = 2 if i == 0 and stage > 1 else 1
                x = block(self.channels(channels), stride, name=f"layer{stage}_{i}")(x, train)
        return self.logits(x)


resnet18 = partial(ResNet, blocks=(2, 2, 2, 2))
resnet34 = partial(ResNet, blocks=(3, 4, 6, 3))
resnet50 = partial(ResNet, blocks=(3, 4, 6, 3), bottleneck=True)
resnet101 = partial(ResNet, blocks=(3, 4, 23, 3), bottleneck=True)
resnet152 = partial(ResNet, blocks=(3, 8, 36, 3), bottleneck=True)
resnet_digits = partial(ResNet, blocks=(1, 1), widths=(64, 64), stem_stride=2)

imagenet_resnet18 = partial(resnet18, imagenet=True)
imagenet_resnet34 = partial(resnet34, imagenet=True)
imagenet_resnet50 = partial(resnet50, imagenet=True)
imagenet_resnet101 = partial(resnet101, imagenet=True)
imagenet_wide_resnet50_2 = partial(resnet50, imagenet=True, inner=2)
imagenet_wide_resnet101_2 = partial(resnet101, imagenet=True, inner=2)
