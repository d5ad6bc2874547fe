"""The networks, by name.

Every constructor takes num_classes, mean, std, width, dtype, param_dtype, bn_axis and remat, and what its family has
besides, and returns a Flax Linen module called as `module.apply(variables, images, train=...)` on images [N, H, W, C]
in [0, 1]; it normalises them itself and returns logits [N, num_classes]. Modules know nothing of masks. Submodule names
are those of the paper's released code with "_" for ".", so its checkpoints map onto ours by that rule alone.
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

import flax.linen as nn
import jax.numpy as jnp
import msgspec
from jax.typing import DTypeLike

from rst_jax.config import near
from rst_jax.models import convnet, resnet, wide_resnet

MODELS: dict[str, partial[Any]] = {
    "conv2": convnet.conv2,
    "conv4": convnet.conv4,
    "conv6": convnet.conv6,
    "conv8": convnet.conv8,
    "resnet_digits": resnet.resnet_digits,
    "resnet18": resnet.resnet18,
    "resnet34": resnet.resnet34,
    "resnet50": resnet.resnet50,
    "resnet101": resnet.resnet101,
    "resnet152": resnet.resnet152,
    "imagenet_resnet18": resnet.imagenet_resnet18,
    "imagenet_resnet34": resnet.imagenet_resnet34,
    "imagenet_resnet50": resnet.imagenet_resnet50,
    "imagenet_resnet101": resnet.imagenet_resnet101,
    "imagenet_wide_resnet50_2": resnet.imagenet_wide_resnet50_2,
    "imagenet_wide_resnet101_2": resnet.imagenet_wide_resnet101_2,
    "wrn10_1": wide_resnet.wrn10_1,
    "wrn28_10": wide_resnet.wrn28_10,
    "wrn34_10": wide_resnet.wrn34_10,
}
# What a specification gives by itself, and what `ModelSpec.make` takes: no arguments of a network.
_OTHERS = {"name", "parent", "num_classes", "mean", "std", "dtype", "param_dtype", "bn_axis", "remat"}


@dataclasses.dataclass(frozen=True, init=False)
class ModelSpec:
    """A network by name: all that its construction needs and a ticket's file keeps. Hashable.

    Attributes:
      name: a key of `MODELS`.
      num_classes: logits an image.
      mean, std: of each channel, on the [0, 1] scale; the network computes (images - mean) / std.
      arguments: others of the constructor, by name, for instance (("width", 0.5),); lists become tuples.

    Raises:
      ValueError: an unknown name, an argument that this network does not take (the nearest one is named), or a value of
        another kind.
    """

    name: str
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    arguments: tuple[tuple[str, Any], ...]

    def __init__(self, name: str, num_classes: int, mean: Sequence[float], std: Sequence[float], **arguments: Any):
        if not isinstance(name, str) or name not in MODELS:
            hint = near(str(name), MODELS, "see rst_jax.models.MODELS.")
            raise ValueError(f"model must be one of {', '.join(MODELS)}; got {name!r}; {hint}")
        family: Any = MODELS[name].func
        kinds = {field.name: field.type for field in dataclasses.fields(family) if field.name not in _OTHERS}
        for argument in arguments:
            if argument not in kinds:
                hint = near(argument, kinds, f"it takes {', '.join(kinds)}.")
                raise ValueError(f"model {name!r} takes no argument {argument!r}; {hint}")
        own = tuple(sorted((key, _as(kinds[key], value, key)) for key, value in arguments.items()))
        mean, std = (_as(tuple[float, ...], value, told) for value, told in ((mean, "mean"), (std, "std")))
        if not mean or len(mean) != len(std) or min(std) <= 0:
            raise ValueError(f"mean and std must be of each channel, std above 0; got {list(mean)} and {list(std)}.")
        classes = _as(Annotated[int, msgspec.Meta(ge=1)], num_classes, "num_classes")
        fields = {"name": name, "num_classes": classes, "mean": mean, "std": std, "arguments": own}
        for field, value in fields.items():
            object.__setattr__(self, field, value)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `ModelSpec(**plain)` is the spec again."""
        own = {"name": self.name, "num_classes": self.num_classes, "mean": self.mean, "std": self.std}
        return {key: _plain(value) for key, value in (own | dict(self.arguments)).items()}

    def make(
        self,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        bn_axis: str | None = None,
        remat: bool = False,
    ) -> nn.Module:
        """The Flax module.

        Args:
          dtype: of the computation; the last layer and the logits have param_dtype.
          param_dtype: of the weights and statistics.
          bn_axis: a mesh axis over which batch statistics are averaged; None keeps them on each device.
          remat: residual blocks keep only their inputs for the gradient and compute the rest again: less memory, more
            time.
        """
        fixed = {"num_classes": self.num_classes, "mean": self.mean, "std": self.std, **dict(self.arguments)}
        return MODELS[self.name](**fixed, dtype=dtype, param_dtype=param_dtype, bn_axis=bn_axis, remat=remat)


def _as(kind: Any, value: Any, name: str) -> Any:
    """A value as one of a type; lists become tuples, whole numbers floats.

    Raises:
      ValueError: it is of another, or not finite.
    """
    try:
        made = msgspec.convert(_plain(value), kind)
    except ValueError as error:
        raise ValueError(f"{name}: {error}.") from error
    if any(isinstance(v, float) and not math.isfinite(v) for v in (made if isinstance(made, tuple) else (made,))):
        raise ValueError(f"{name} must be finite; got {value}.")
    return made


def _plain(value: Any) -> Any:
    """Plain numbers and lists, whoever's they were."""
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    return value.tolist() if hasattr(value, "tolist") else value
