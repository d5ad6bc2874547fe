"""All tickets of a run: a file each, and one Orbax checkpoint of the frozen weights with every ratio's packed masks.

Orbax writes to a temporary name and renames, so a kill leaves the checkpoint before.
"""

import contextlib
import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from rst_jax import subnet
from rst_jax.models import ModelSpec
from rst_jax.runtime.files import make_folder
from rst_jax.runtime.mesh import from_main, is_main
from rst_jax.runtime.work import cause
from rst_jax.tickets.file import load_ticket, origin_of, save_ticket
from rst_jax.tickets.ticket import Ticket


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
    content = {
        "params": params,
        "tickets": {t.name: {"masks": subnet.pack(t.masks), "batch_stats": t.batch_stats} for t in tickets},
    }
    told = {
        t.name: {"remaining_ratio": t.remaining_ratio, "kind": t.kind, "meta": dataclasses.asdict(t.origin)}
        for t in tickets
    }
    about = {
        "mask_shapes": jax.tree.map(lambda m: list(m.shape), tickets[0].masks),
        "model": tickets[0].model.to_dict(),
        "image_shape": list(tickets[0].image_shape),
        "tickets": told,
    }
    make_folder(directory.parent)
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
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            restored = checkpointer.restore(
                directory.absolute(),
                args=ocp.args.Composite(tickets=ocp.args.StandardRestore(), about=ocp.args.JsonRestore()),
            )
    except Exception as error:  # Orbax and TensorStore raise many kinds
        raise ValueError(f"{directory}: this checkpoint of tickets cannot be read ({cause(error)}).") from error
    content, about = jax.tree.map(np.asarray, restored.tickets), dict(restored.about)
    shapes = jax.tree.map(
        lambda shape: np.empty(shape, bool), about["mask_shapes"], is_leaf=lambda s: isinstance(s, list)
    )
    tickets = []
    for name, told in about["tickets"].items():
        stored = content["tickets"][name]
        tickets.append(
            Ticket.make(
                ModelSpec(**about["model"]),
                about["image_shape"],
                told["remaining_ratio"],
                content["params"],
                subnet.unpack(stored["masks"], shapes),
                stored.get("batch_stats") or {},
                told.get("kind", "scratch"),
                origin_of(told["meta"]),
            )
        )
    return sorted(tickets, key=lambda t: t.remaining_ratio)
