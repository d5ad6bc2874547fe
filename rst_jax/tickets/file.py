"""The file of a ticket.

A `.ticket` file is a zip that NumPy can read (no pickle): `meta` as the bytes of JSON, the packed mask of each kernel,
the batch statistics, and the weights that the masks keep.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from rst_jax.models import ModelSpec
from rst_jax.runtime.files import read_arrays, write_arrays
from rst_jax.runtime.paths import local_path
from rst_jax.tickets.ticket import Origin, Ticket

_FORMAT = 1


def save_ticket(ticket: Ticket, path: str | Path) -> None:
    """Write the file; it appears whole or not at all."""
    meta = {
        "format": _FORMAT,
        "model": ticket.model.to_dict(),
        "image_shape": list(ticket.image_shape),
        "remaining_ratio": ticket.remaining_ratio,
        "digest": ticket.digest,
        "kind": ticket.kind,
        "meta": dataclasses.asdict(ticket.origin),
    }
    arrays: dict[str, np.ndarray] = {"meta": np.frombuffer(json.dumps(meta).encode(), np.uint8)}
    for name, mask in _flat(ticket.masks):
        arrays[f"mask/{name}"] = np.packbits(np.asarray(mask, bool).reshape(-1))
        arrays[f"mask_shape/{name}"] = np.asarray(np.shape(mask), np.int32)
    masks = dict(_flat(ticket.masks))
    for name, weight in _flat(ticket.weights):
        weight = np.asarray(weight)
        arrays[f"shape/{name}"] = np.asarray(weight.shape, np.int32)
        keep = np.broadcast_to(masks[name], weight.shape) if name in masks else np.ones(weight.shape, bool)
        arrays[f"weight/{name}"] = _shrink(weight[keep])
    for name, value in _flat(ticket.batch_stats):
        arrays[f"stats/{name}"] = np.asarray(value)
    write_arrays(local_path(path), arrays)


def load_ticket(path: str | Path) -> Ticket:
    """Read a `.ticket` file.

    Raises:
      ValueError: there is no such file, it is not a ticket, or its digest does not match its content.
    """
    path = local_path(path)
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
            model=ModelSpec(**meta["model"]),
            image_shape=tuple(meta["image_shape"]),
            remaining_ratio=meta["remaining_ratio"],
            weights=_nest(weights),
            masks=_nest(masks),
            batch_stats=_nest(part("stats/")),
            kind=meta.get("kind") or ("scratch" if masks else "dense"),
            origin=origin_of(meta["meta"]),
        )
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path}: this is not a readable ticket: {error}.") from error
    if ticket.digest != meta["digest"]:
        raise ValueError(
            f"{path}: damaged; its content's digest is {ticket.digest[:12]}, it says {meta['digest'][:12]}."
        )
    return ticket


def origin_of(told: Mapping[str, Any]) -> Origin:
    """What the file says of the origin; other entries, which earlier versions let callers add, are left out."""
    return Origin(**{field.name: told[field.name] for field in dataclasses.fields(Origin) if field.name in told})


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


def _flat(tree: PyTree) -> list[tuple[str, Any]]:
    return [("/".join(p.key for p in path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _nest(flat: dict[str, Any]) -> PyTree:
    tree: PyTree = {}
    for name, value in flat.items():
        *folders, last = name.split("/")
        here = tree
        for folder in folders:
            here = here.setdefault(folder, {})
        here[last] = value
    return tree
