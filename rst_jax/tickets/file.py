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

import numpy as np

from rst_jax.models import ModelSpec
from rst_jax.runtime.door import Stored, from_json, stored_arrays
from rst_jax.runtime.files import write_arrays
from rst_jax.runtime.paths import local_path
from rst_jax.tickets.fit import Network, Pixels, Told, check_array, check_finite, flat, nest, same_names
from rst_jax.tickets.ticket import Ticket

_LONGEST = 2**16  # bytes of what a file tells besides its arrays


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Meta(Told):
    """What a ticket's file says besides its arrays."""

    model: dict[str, Any]
    image_shape: tuple[Pixels, Pixels, Pixels]


def save_ticket(ticket: Ticket, path: str | Path) -> None:
    """Write the file; it appears whole or not at all.

    Raises:
      ValueError: it would not be read: its kind and its masks do not go together.
    """
    if bool(ticket.masks) == (ticket.kind == "dense"):
        raise ValueError(f"a ticket of kind {ticket.kind!r} has {'no masks' if ticket.masks else 'masks'}.")
    meta = {
        "format": ticket.format,
        "model": ticket.model.to_dict(),
        "image_shape": list(ticket.image_shape),
        "remaining_ratio": ticket.remaining_ratio,
        "digest": ticket.digest,
        "kind": ticket.kind,
        "meta": dataclasses.asdict(ticket.origin),
    }
    arrays: dict[str, np.ndarray] = {"meta": np.frombuffer(json.dumps(meta).encode(), np.uint8)}
    for name, mask in flat(ticket.masks):
        arrays[f"mask/{name}"] = np.packbits(np.asarray(mask, bool).reshape(-1))
        arrays[f"mask_shape/{name}"] = np.asarray(np.shape(mask), np.int32)
    masks = dict(flat(ticket.masks))
    for name, weight in flat(ticket.weights):
        weight = np.asarray(weight)
        arrays[f"shape/{name}"] = np.asarray(weight.shape, np.int32)
        keep = np.broadcast_to(masks[name], weight.shape) if name in masks else np.ones(weight.shape, bool)
        arrays[f"weight/{name}"] = _shrink(weight[keep])
    for name, value in flat(ticket.batch_stats):
        arrays[f"stats/{name}"] = np.asarray(value)
    write_arrays(local_path(path), arrays)


def load_ticket(path: str | Path) -> Ticket:
    """Read a `.ticket` file.

    Raises:
      ValueError: there is no such file, it is not a ticket, or its digest does not match its content.
    """
    path = local_path(path)
    with stored_arrays(path) as stored:
        try:
            meta = _meta(stored)
            ticket = _ticket(stored, meta, path.stat().st_size)
            check_finite(ticket)
        except (ValueError, TypeError, MemoryError) as error:
            raise ValueError(f"{path}: this is not a readable ticket: {str(error).rstrip('.')}.") from error
    try:
        return meta.check(ticket)
    except ValueError as error:
        raise ValueError(f"{path}: {error}.") from error


def _meta(stored: Mapping[str, Stored]) -> _Meta:
    if "meta" not in stored:
        raise ValueError("it holds no 'meta'")
    told = stored["meta"]
    if told.dtype != np.uint8 or len(told.shape) != 1 or told.shape[0] > _LONGEST:
        raise ValueError(f"its 'meta' is {told.dtype} {list(told.shape)}; expected text")
    return from_json(told.read().tobytes(), _Meta)


def _ticket(stored: Mapping[str, Stored], meta: _Meta, size: int) -> Ticket:
    """The ticket; of each array is seen that it fits before it is read."""

    def part(prefix: str) -> dict[str, Stored]:
        return {name.removeprefix(prefix): array for name, array in stored.items() if name.startswith(prefix)}

    model = ModelSpec(**meta.model)
    network, packed, stats = Network(model, meta.image_shape, size, len(stored)), part("mask/"), part("stats/")
    kind = meta.kind or ("scratch" if packed else "dense")
    shapes = {name: _shape(name, array) for name, array in part("mask_shape/").items()}
    network.check_masks(shapes, kind)
    same_names(shapes, packed, "mask")
    for what in ("shape", "weight"):
        same_names(network.params, part(f"{what}/"), what)
    same_names(network.batch_stats, stats, "statistic")
    known = 1 + 2 * len(shapes) + 2 * len(network.params) + len(stats)
    if len(stored) != known:
        raise ValueError(f"it holds {len(stored)} arrays; expected {known}")
    masks = {name: _mask(name, packed[name], shape) for name, shape in shapes.items()}
    weights = {}
    for name, shape in network.params.items():
        if (said := _shape(name, stored[f"shape/{name}"])) != shape:
            raise ValueError(f"{name}: expected {list(shape)}; it is {list(said)}")
        weights[name] = _weight(name, stored[f"weight/{name}"], shape, masks.get(name))
    for name, shape in network.batch_stats.items():
        check_array(name, stats[name].shape, stats[name].dtype, shape)
    read = {name: array.read() for name, array in stats.items()}
    trees = nest(weights), nest(masks), nest(read)
    return Ticket(model, meta.image_shape, meta.remaining_ratio, *trees, kind, meta.meta, meta.format)


def _shape(name: str, stored: Stored) -> tuple[int, ...]:
    if stored.dtype != np.int32 or len(stored.shape) != 1 or stored.shape[0] > 8:
        raise ValueError(f"the shape of {name} is {stored.dtype} {list(stored.shape)}; expected int32 [axes]")
    return tuple(map(int, stored.read()))


def _mask(name: str, stored: Stored, shape: tuple[int, ...]) -> np.ndarray:
    n = math.prod(shape)
    check_array(f"the mask of {name}", stored.shape, stored.dtype, (math.ceil(n / 8),), "bytes")
    return np.unpackbits(stored.read(), count=n).astype(bool).reshape(shape)


def _weight(name: str, stored: Stored, shape: tuple[int, ...], mask: np.ndarray | None) -> np.ndarray:
    """A parameter, zero where its mask keeps nothing."""
    keep = np.broadcast_to(True if mask is None else mask, shape)
    n = int(keep.sum())
    if stored.dtype.names is None:
        check_array(name, stored.shape, stored.dtype, (n,))
        kept = stored.read()
    else:
        kept = _grow(name, stored, n)
    weight = np.zeros(shape, kept.dtype)
    weight[keep] = kept
    return weight


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


def _grow(name: str, stored: Stored, n: int) -> np.ndarray:
    """The inverse of `_shrink`, for n values."""
    fields: Mapping[str, Any] = stored.dtype.fields or {}
    if stored.shape != () or set(fields) != {"magnitude", "count", "bits"}:
        raise ValueError(f"{name}: expected floats or their signs; it is {stored.dtype} {list(stored.shape)}")
    check_array(f"the magnitude of {name}", (), fields["magnitude"][0], ())
    bits = fields["bits"][0]
    check_array(f"the signs of {name}", bits.shape, bits.base, (math.ceil(n / 8),), "bytes")
    record = stored.read()
    if int(record["count"]) != n:
        raise ValueError(f"{name}: it has {record['count']} signs; its mask keeps {n}")
    positive = np.unpackbits(record["bits"], count=n).astype(bool)
    return np.where(positive, record["magnitude"], -record["magnitude"]).astype(record["magnitude"].dtype)
