"""A ticket and its file.

A `.ticket` file is a zip that NumPy can read (no pickle): `meta.json` as bytes, the packed mask
of each kernel, the batch statistics, and the weights that the masks keep.
"""

import dataclasses
import json
import math
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rst_jax import subnet
from rst_jax.models import ModelSpec
from rst_jax.records import digest
from rst_jax.runtime.files import read_arrays, write_arrays

Tree = Any
_FORMAT = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Ticket:
    """A subnetwork ready to classify: weights (masked), masks, batch statistics, and the network they fit.

    Attributes:
      model: the constructor's arguments: name, num_classes, mean, std.
      image_shape: [H, W, C].
      remaining_ratio: the fraction of weights kept; 1.0 for a dense network.
      weights: parameters with the masks applied.
      masks: bool trees in the scores' shapes; {} for a dense network.
      meta: anything else worth keeping: seed, dataset, epoch.
    """

    model: dict[str, Any]
    image_shape: tuple[int, ...]
    remaining_ratio: float
    weights: Tree
    masks: Tree
    batch_stats: Tree
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def variables(self) -> dict[str, Tree]:
        """What the module's `apply` takes."""
        return {"params": self.weights, "batch_stats": self.batch_stats}

    @classmethod
    def make(
        cls,
        model: dict[str, Any],
        image_shape: tuple[int, ...],
        ratio: float,
        params: Tree,
        masks: Tree,
        batch_stats: Tree,
        meta: dict[str, Any],
    ) -> "Ticket":
        """A ticket from unmasked parameters, its arrays on the host."""
        params, masks, batch_stats = jax.tree.map(np.asarray, (params, masks, batch_stats))
        weights = jax.tree.map(lambda w: w + 0.0, subnet.apply_masks(params, masks))  # no -0.0: digests compare bytes
        weights = jax.tree.map(np.asarray, weights)
        return cls(model, tuple(image_shape), ratio, weights, masks, batch_stats, meta)

    @cached_property
    def module(self) -> nn.Module:
        """The Flax module, in float32."""
        m = self.model
        return ModelSpec(m["name"], m["num_classes"], tuple(m["mean"]), tuple(m["std"])).make()

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the weights and the statistics: two tickets that classify alike share it."""
        return digest(self.weights, self.batch_stats)

    @cached_property
    def weight_counts(self) -> tuple[int, int]:
        """Kept and total weights over all kernels."""
        kernels = subnet.kernels(self.weights)
        total = sum(leaf.size for leaf in jax.tree.leaves(kernels))
        if not self.masks:
            return total, total
        per_score = jax.tree.map(lambda k, m: int(np.sum(m)) * (k.size // m.size), kernels, self.masks)
        return sum(jax.tree.leaves(per_score)), total

    def __call__(self, images: Any) -> jax.Array:
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

    def save(self, path: str | Path) -> None:
        """Write the file; it appears whole or not at all."""
        meta = {
            "format": _FORMAT,
            "model": self.model,
            "image_shape": list(self.image_shape),
            "remaining_ratio": self.remaining_ratio,
            "digest": self.digest,
            "meta": self.meta,
        }
        arrays: dict[str, np.ndarray] = {"meta": np.frombuffer(json.dumps(meta).encode(), np.uint8)}
        for name, mask in _flat(self.masks):
            arrays[f"mask/{name}"] = np.packbits(np.asarray(mask, bool).reshape(-1))
            arrays[f"mask_shape/{name}"] = np.asarray(np.shape(mask), np.int32)
        masks = dict(_flat(self.masks))
        for name, weight in _flat(self.weights):
            weight = np.asarray(weight)
            arrays[f"shape/{name}"] = np.asarray(weight.shape, np.int32)
            keep = np.broadcast_to(masks[name], weight.shape) if name in masks else np.ones(weight.shape, bool)
            arrays[f"weight/{name}"] = _shrink(weight[keep])
        for name, value in _flat(self.batch_stats):
            arrays[f"stats/{name}"] = np.asarray(value)
        write_arrays(Path(path), arrays)


@partial(jax.jit, static_argnums=0)
def _logits(module: nn.Module, variables: Tree, images: jax.Array) -> Any:
    return module.apply(variables, images, train=False)


def _shrink(values: np.ndarray) -> np.ndarray:
    """Signed constants as [bits..., magnitude]: one bit a weight; anything else as it is."""
    if values.ndim == 1 and values.size and np.all(np.abs(values) == np.abs(values[0])) and values[0] != 0:
        record = np.zeros(
            (),
            [
                ("magnitude", values.dtype),
                ("count", np.int64),
                ("bits", np.uint8, (math.ceil(values.size / 8),)),
            ],
        )
        record["magnitude"], record["count"], record["bits"] = (
            abs(values[0]),
            values.size,
            np.packbits(values > 0),
        )
        return record
    return values


def _grow(stored: np.ndarray) -> np.ndarray:
    if stored.dtype.names is None:
        return stored
    positive = np.unpackbits(stored["bits"], count=int(stored["count"])).astype(bool)
    return np.where(positive, stored["magnitude"], -stored["magnitude"]).astype(stored["magnitude"].dtype)


def _flat(tree: Tree) -> list[tuple[str, Any]]:
    return [("/".join(p.key for p in path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _nest(flat: dict[str, Any]) -> Tree:
    tree: Tree = {}
    for name, value in flat.items():
        *folders, last = name.split("/")
        here = tree
        for folder in folders:
            here = here.setdefault(folder, {})
        here[last] = value
    return tree


def load_ticket(path: str | Path) -> Ticket:
    """Read a `.ticket` file.

    Raises:
      ValueError: there is no such file, it is not a ticket, or its digest does not match its content.
    """
    path = Path(path)
    arrays = read_arrays(path)
    try:
        meta = json.loads(arrays["meta"].tobytes())
        if meta["format"] != _FORMAT:
            raise ValueError(f"it has format {meta['format']}, this version reads {_FORMAT}")

        def part(prefix: str) -> dict[str, np.ndarray]:
            return {name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)}

        mask_shapes, masks = part("mask_shape/"), {}
        for name, packed in part("mask/").items():
            shape = tuple(int(n) for n in mask_shapes[name])
            masks[name] = np.unpackbits(packed, count=math.prod(shape)).astype(bool).reshape(shape)
        weights = {}
        for name, stored_shape in part("shape/").items():
            kept = _grow(arrays[f"weight/{name}"])
            weight = np.zeros(tuple(int(n) for n in stored_shape), kept.dtype)
            weight[np.broadcast_to(masks[name], weight.shape) if name in masks else ...] = (
                kept if name in masks else kept.reshape(weight.shape)
            )
            weights[name] = weight
        ticket = Ticket(
            model=meta["model"],
            image_shape=tuple(meta["image_shape"]),
            remaining_ratio=meta["remaining_ratio"],
            weights=_nest(weights),
            masks=_nest(masks),
            batch_stats=_nest(part("stats/")),
            meta=meta["meta"],
        )
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path}: this is not a readable ticket: {error}.") from error
    if ticket.digest != meta["digest"]:
        raise ValueError(
            f"{path}: damaged; its content's digest is {ticket.digest[:12]}, it says {meta['digest'][:12]}."
        )
    return ticket
