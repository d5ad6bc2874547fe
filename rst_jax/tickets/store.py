"""All tickets of a run: a file each, and one Orbax checkpoint of the frozen weights with every ratio's packed masks.

Orbax writes to a temporary name and renames, so a kill leaves the checkpoint before.
"""

import contextlib
import dataclasses
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import msgspec
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from rst_jax import subnet
from rst_jax.models import ModelSpec
from rst_jax.runtime.door import read_json
from rst_jax.runtime.files import make_folder
from rst_jax.runtime.mesh import from_main, is_main
from rst_jax.runtime.work import cause
from rst_jax.tickets.file import load_ticket, save_ticket
from rst_jax.tickets.fit import Network, Pixels, Told, check_array, check_finite, flat, nest, same_names
from rst_jax.tickets.ticket import Ticket


@dataclasses.dataclass(frozen=True, kw_only=True)
class _About:
    """What the checkpoint says of its tickets besides their arrays."""

    mask_shapes: dict[str, Any]
    model: dict[str, Any]
    image_shape: tuple[Pixels, Pixels, Pixels]
    tickets: dict[str, Told]

    @property
    def spec(self) -> ModelSpec:
        """The network."""
        return ModelSpec(**self.model)


class TicketStore:
    """The tickets of a workdir, each read once: `tickets/NAME.ticket`, and `checkpoints/tickets` for switching.

    Args:
      workdir: the run's.
    """

    def __init__(self, workdir: Path):
        self.folder, self.checkpoint = workdir / "tickets", workdir / "checkpoints" / "tickets"
        self._read: dict[str, Ticket] = {}

    def path(self, name: str) -> Path:
        """Where a ticket's file lies."""
        return self.folder / f"{name}.ticket"

    def __contains__(self, name: str) -> bool:
        return bool(from_main(np.asarray(self.path(name).exists())))

    def load(self, name: str) -> Ticket:
        """The ticket of that name.

        Raises:
          ValueError: there is none, or it is broken.
        """
        if name not in self._read:
            self._read[name] = load_ticket(self.path(name))
        return self._read[name]

    def save(self, ticket: Ticket) -> None:
        """Keep a ticket under its name; nobody goes on before the file is there."""
        if is_main():
            save_ticket(ticket, self.path(ticket.name))
        from_main(np.zeros(()))
        self._read[ticket.name] = ticket

    def scratch(self) -> list[Ticket]:
        """Every ticket here whose weights nobody trained, by name."""
        names = [path.stem for path in sorted(self.folder.glob("*.ticket"))]
        found = [ticket for name in names if (ticket := self.load(name)).name == name]  # no file that strayed here
        return [ticket for ticket in found if ticket.kind == "scratch"]

    def in_checkpoint(self) -> dict[str, str]:
        """Of each ticket in the checkpoint its name and digest; nothing where there is none that can be read."""
        with contextlib.suppress(ValueError):
            return {ticket.name: ticket.digest for ticket in restore_tickets(self.checkpoint)}
        return {}


def save_tickets(directory: Path, params: PyTree, tickets: Sequence[Ticket]) -> None:
    """One checkpoint: the weights that the tickets share, and of each its packed masks and its batch statistics.

    Args:
      directory: a folder that appears whole, the one before it kept until then.
      params: the weights without masks.
      tickets: of one network, with masks, under different names.
    """
    make_folder(directory.parent)
    content = {
        "params": params,
        "tickets": {t.name: {"masks": subnet.pack(t.masks), "batch_stats": t.batch_stats} for t in tickets},
    }
    told = {
        t.name: {
            "remaining_ratio": t.remaining_ratio,
            "kind": t.kind,
            "meta": dataclasses.asdict(t.origin),
            "format": t.format,
            "digest": t.digest,
        }
        for t in tickets
    }
    about = {
        "mask_shapes": jax.tree.map(lambda m: list(m.shape), tickets[0].masks),
        "model": tickets[0].model.to_dict(),
        "image_shape": list(tickets[0].image_shape),
        "tickets": told,
    }
    new, old = (directory.with_name(f".{directory.name}-{age}") for age in ("new", "old"))
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(
            new.absolute(),
            args=ocp.args.Composite(
                tickets=ocp.args.StandardSave(jax.tree.map(np.asarray, content)), about=ocp.args.JsonSave(about)
            ),
            force=True,
        )
    if is_main():
        shutil.rmtree(old, ignore_errors=True)
        if directory.exists():
            directory.rename(old)
        new.rename(directory)
        shutil.rmtree(old, ignore_errors=True)
    from_main(np.zeros(()))  # nobody reads before it is in place


def restore_tickets(directory: Path) -> list[Ticket]:
    """The tickets that `save_tickets` wrote, in ascending order of their ratios.

    Raises:
      ValueError: there is no such checkpoint, or it cannot be read.
    """
    if not directory.is_dir():
        raise ValueError(f"{directory}: there is no checkpoint of tickets; the stage 'search' writes it.")
    try:
        about = read_json(directory / "about" / "metadata", _About)
        shapes = dict(_shapes(about.mask_shapes))
        content = _restore(directory / "tickets", about, shapes)
        tickets = [_ticket(about, name, content, shapes) for name in about.tickets]
    except Exception as error:  # Orbax and TensorStore raise many kinds
        raise ValueError(f"{directory}: this checkpoint of tickets cannot be read ({cause(error)}).") from error
    return sorted(tickets, key=lambda t: t.remaining_ratio)


def _shapes(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, tuple[int, ...]]]:
    """The shapes of nested dicts by their paths."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _shapes(value, f"{prefix}{name}/")
        else:
            yield prefix + name, msgspec.convert(value, tuple[int, ...])


def _restore(folder: Path, about: _About, shapes: dict[str, tuple[int, ...]]) -> PyTree:
    """The arrays; that they fit is seen before any is read."""
    files = [path for path in folder.rglob("*") if not path.is_dir()]
    if strange := [path for path in files if not path.is_file()]:  # a pipe would be waited for
        raise ValueError(f"{strange[0]} is no ordinary file")
    with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
        declared = dict(flat(handler.metadata(folder.absolute()).tree))
        size = sum(path.stat().st_size for path in files)
        network = Network(about.spec, about.image_shape, size, len(declared))
        wanted = {f"params/{name}": (shape, "floats") for name, shape in network.params.items()}
        for ticket, told in about.tickets.items():
            network.check_masks(shapes, told.kind or "scratch")
            packed = {name: (math.ceil(math.prod(shape) / 8),) for name, shape in shapes.items()}
            wanted |= {f"tickets/{ticket}/masks/{name}": (shape, "bytes") for name, shape in packed.items()}
            stats = network.batch_stats.items()
            wanted |= {f"tickets/{ticket}/batch_stats/{name}": (shape, "floats") for name, shape in stats}
        same_names(wanted, declared, "array")
        for name, (shape, what) in wanted.items():
            check_array(name, declared[name].shape, np.dtype(declared[name].dtype), shape, what)
        return jax.tree.map(np.asarray, handler.restore(folder.absolute()))


def _ticket(about: _About, name: str, content: PyTree, shapes: dict[str, tuple[int, ...]]) -> Ticket:
    told, stored = about.tickets[name], content["tickets"][name]
    if told.meta.name != name:
        raise ValueError(f"the ticket {name!r} calls itself {told.meta.name!r}")
    masks = subnet.unpack(stored["masks"], nest({mask: np.empty(shape, bool) for mask, shape in shapes.items()}))
    parts = content["params"], masks, stored.get("batch_stats") or {}
    kind = told.kind or "scratch"
    ticket = Ticket.make(about.spec, about.image_shape, told.remaining_ratio, *parts, kind, told.meta, told.format)
    check_finite(ticket)
    return told.check(ticket)
