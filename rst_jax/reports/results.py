"""What a workdir has recorded."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from rst_jax.records import R2SRecord, TicketRecord, TransferRecord, read_json
from rst_jax.runtime.files import among, check_arrays, read_arrays, read_lines


@dataclasses.dataclass(frozen=True)
class Results:
    """All that a workdir has recorded; a part that was not run is None or empty."""

    tickets: list[TicketRecord]
    transfer: TransferRecord | None
    r2s: R2SRecord | None
    metrics: list[dict[str, Any]]
    gallery: dict[str, np.ndarray] | None
    cards: list[Path] = dataclasses.field(default_factory=list)

    @property
    def tickets_alone(self) -> list[TicketRecord]:
        """Without dense networks."""
        return [t for t in self.tickets if t.kind != "dense"]

    @property
    def dense(self) -> list[TicketRecord]:
        """Dense networks, to compare with."""
        return [t for t in self.tickets if t.kind == "dense"]


def read_results(workdir: Path, names: list[str]) -> Results:
    """The records of the named tickets and whatever else lies in results/.

    Raises:
      ValueError: nothing was evaluated yet, or a record is broken.
    """
    folder = workdir / "results"
    tickets = [read_json(folder / f"{n}.json", TicketRecord) for n in names if (folder / f"{n}.json").exists()]
    if not tickets:
        raise ValueError(f"{workdir}: nothing evaluated yet; run with --config.stages=('evaluate',) first.")
    transfer, r2s, gallery = (folder / n for n in ("transfer.json", "r2s.json", "gallery.npz"))
    return Results(
        tickets,
        read_json(transfer, TransferRecord) if transfer.exists() else None,
        read_json(r2s, R2SRecord) if r2s.exists() else None,
        read_lines(workdir / "metrics.jsonl"),
        read_gallery(gallery) if gallery.exists() else None,
        [card.parent for t in tickets for card in sorted((folder / "cards").glob(f"{t.name}-*/card.json"))],
    )


def read_gallery(path: Path) -> dict[str, np.ndarray]:
    """Images to look at: clean and adversarial [n, H, W, C], labels, predictions [n], class names.

    Raises:
      ValueError: there are none, or they are no such images.
    """
    found = read_arrays(path)
    images, said = ("clean", "adversarial"), ("labels", "clean_prediction", "adversarial_prediction")
    wanted = dict.fromkeys(images, "f n h w c") | dict.fromkeys(said, "i n") | {"names": "U k"}
    lengths = check_arrays(path, found, wanted)
    if not lengths["n"] or not all(among(found[k], lengths["k"]) for k in said):
        raise ValueError(f"{path}: expected images of its {lengths['k']} classes.")
    return found
