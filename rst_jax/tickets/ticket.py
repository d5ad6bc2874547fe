"""A ticket: frozen weights, a mask and batch statistics, ready to classify, and where it comes from."""

import dataclasses
import json
from functools import cached_property, partial
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from rst_jax import subnet
from rst_jax.models import ModelSpec
from rst_jax.records import digest
from rst_jax.runtime.text import check_name

Kind = Literal["scratch", "finetuned", "trained", "dense"]


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a ticket comes from, as far as it is known.

    Attributes:
      name: as its run calls it.
      dataset: that it was drawn on.
      seed: of the run.
      pattern, weight_init: as in the configuration.
      epoch: its checkpoint's; selected_on: the images that chose it ("holdout", "test").
      selection_natural, selection_robust: accuracies on those images, fractions.

    Raises:
      ValueError: the name is no plain word, which files and folders could have.
    """

    name: str = "ticket"
    dataset: str = ""
    seed: int = 0
    pattern: str = ""
    weight_init: str = ""
    epoch: int = 0
    selected_on: str = ""
    selection_natural: float | None = None
    selection_robust: float | None = None

    def __post_init__(self) -> None:
        check_name(self.name, "a ticket's name")


@dataclasses.dataclass(frozen=True, eq=False)
class Ticket:
    """A subnetwork ready to classify: weights (masked), masks, batch statistics, and the network they fit.

    Attributes:
      model: the network by name and arguments.
      image_shape: [H, W, C].
      remaining_ratio: the fraction of weights kept; 1.0 for a dense network.
      weights: parameters with the masks applied.
      masks: bool trees in the scores' shapes; {} for a dense network.
      kind: scratch (a mask over weights that nobody trained), finetuned (its weights trained under the mask), trained
        (a mask over trained weights) or dense (no mask).
      origin: where it comes from.
      format: of its file; 1: as version 0.3 wrote it, whose digest covers weights and statistics alone.
    """

    model: ModelSpec
    image_shape: tuple[int, ...]
    remaining_ratio: float
    weights: PyTree
    masks: PyTree
    batch_stats: PyTree
    kind: Kind = "scratch"
    origin: Origin = Origin()
    format: int = 2

    @property
    def name(self) -> str:
        """As its run calls it."""
        return self.origin.name

    @property
    def variables(self) -> dict[str, PyTree]:
        """What the module's `apply` takes."""
        return {"params": self.weights, "batch_stats": self.batch_stats}

    @classmethod
    def make(
        cls,
        model: ModelSpec,
        image_shape: tuple[int, ...],
        ratio: float,
        params: PyTree,
        masks: PyTree,
        batch_stats: PyTree,
        kind: Kind = "scratch",
        origin: Origin = Origin(),
        format: int = 2,
    ) -> "Ticket":
        """A ticket from unmasked parameters, its arrays on the host."""
        params, masks, batch_stats = jax.tree.map(np.asarray, (params, masks, batch_stats))
        weights = jax.tree.map(lambda w: w + 0.0, subnet.apply_masks(params, masks))  # no -0.0: digests compare bytes
        weights = jax.tree.map(np.asarray, weights)
        return cls(model, tuple(image_shape), ratio, weights, masks, batch_stats, kind, origin, format)

    @cached_property
    def module(self) -> nn.Module:
        """The Flax module, in float32."""
        return self.model.make()

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that it is: weights, statistics, masks, the network, its images, ratio, kind and origin."""
        if self.format == 1:
            return digest(self.weights, self.batch_stats)
        about = {
            "model": self.model.to_dict(),
            "image_shape": list(map(int, self.image_shape)),
            "remaining_ratio": float(self.remaining_ratio),
            "kind": self.kind,
            "origin": dataclasses.asdict(self.origin),
        }
        told = np.frombuffer(json.dumps(about, sort_keys=True).encode(), np.uint8)
        return digest({"weights": self.weights, "batch_stats": self.batch_stats, "masks": self.masks, "about": told})

    @cached_property
    def weight_counts(self) -> tuple[int, int]:
        """Kept and total weights over all kernels."""
        kernels = subnet.kernels(self.weights)
        total = sum(leaf.size for leaf in jax.tree.leaves(kernels))
        if not self.masks:
            return total, total
        per_score = jax.tree.map(lambda k, m: int(np.sum(m)) * (k.size // m.size), kernels, self.masks)
        return sum(jax.tree.leaves(per_score)), total

    def __call__(self, images: jax.typing.ArrayLike) -> jax.Array:
        """Logits [N, num_classes] of images [N, H, W, C], floats in [0, 1].

        Raises:
          ValueError: another shape, integers, or values outside [0, 1].
        """
        images = images if isinstance(images, jax.Array) else np.asarray(images)
        shape = tuple(images.shape)
        if len(shape) != 4 or shape[1:] != tuple(self.image_shape):
            raise ValueError(f"images must be [N, {', '.join(map(str, self.image_shape))}]; got {list(shape)}.")
        if not isinstance(images, jax.core.Tracer):
            if not jnp.issubdtype(images.dtype, jnp.floating):
                raise ValueError(f"images must be floats in [0, 1]; got {images.dtype}. Divide integers by 255.")
            low, high = float(images.min(initial=0.0)), float(images.max(initial=0.0))
            if low < -1e-6 or not high <= 1 + 1e-6:
                raise ValueError(f"images must lie in [0, 1]; got values from {low:.4g} to {high:.4g}.")
        with jax.default_matmul_precision("highest"):  # as it was measured
            return _logits(self.module, self.variables, jnp.asarray(images, jnp.float32))


@partial(jax.jit, static_argnums=0)
def _logits(module: nn.Module, variables: PyTree, images: jax.Array) -> PyTree:
    return module.apply(variables, images, train=False)
