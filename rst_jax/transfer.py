"""Crossing tickets: images made against one, judged by all (the paper's transfer matrix)."""

import dataclasses
from pathlib import Path

import numpy as np

from rst_jax.data import Dataset
from rst_jax.evaluate import Evaluator
from rst_jax.mesh import from_main, is_main
from rst_jax.records import TransferRecord, provenance, read_arrays, write_arrays
from rst_jax.ticket import Ticket


@dataclasses.dataclass(frozen=True)
class Crossed:
    """Per-example flags on the test images.

    Attributes:
      natural: natural[k, n]: ticket k is right on clean image n.
      robust: robust[s, k, n]: ticket k is right on image n attacked through ticket s.
      violations: images a source that left the threat model.
    """

    natural: np.ndarray
    robust: np.ndarray
    violations: list[int]


def cross(evaluator: Evaluator, tickets: list[Ticket], dataset: Dataset, folder: Path) -> Crossed:
    """Attack every ticket on the test images and let every ticket judge.

    The flags of each source are kept in `folder`, so that what is finished is not done again; they are used
    only for the same tickets, attack and images.
    """
    split, images = dataset.test, dataset.scaled(dataset.test)
    stamp = "|".join([str(evaluator.attack_record), dataset.name, str(len(split)), *(t.digest for t in tickets)])
    natural, robust, violations = [], [], []
    for source in tickets:
        path = folder / f"{source.meta['name']}.npz"
        flags = _read(path, stamp + source.digest) if is_main() else None
        if not from_main(np.asarray(flags is not None)):
            adversarial, outside = evaluator.attack(source.variables, images, split.labels, split.ids)
            flags = {
                "natural": evaluator.correct(source.variables, images, split.labels),
                "robust": np.stack([evaluator.correct(t.variables, adversarial, split.labels) for t in tickets]),
                "violations": np.asarray(outside, np.int64),
            }
            if is_main():
                write_arrays(path, {**flags, "stamp": np.asarray(stamp + source.digest)})
        else:
            flags = from_main(flags or _blank(len(tickets), len(split)))
        natural.append(flags["natural"])
        robust.append(flags["robust"])
        violations.append(int(flags["violations"]))
    return Crossed(np.stack(natural), np.stack(robust), violations)


def _blank(tickets: int, images: int) -> dict[str, np.ndarray]:
    return {
        "natural": np.zeros(images, bool),
        "robust": np.zeros((tickets, images), bool),
        "violations": np.zeros((), np.int64),
    }


def _read(path: Path, stamp: str) -> dict[str, np.ndarray] | None:
    try:
        found = read_arrays(path)
    except ValueError:
        return None
    return found if str(found.pop("stamp", "")) == stamp else None


def transfer_record(crossed: Crossed, tickets: list[Ticket], evaluator: Evaluator) -> TransferRecord:
    """The matrix over `tickets`, the first rows and columns of `crossed`."""
    k = len(tickets)
    return TransferRecord(
        names=[t.meta["name"] for t in tickets],
        ratios=[t.remaining_ratio for t in tickets],
        natural=crossed.natural[:k].mean(-1).tolist(),
        robust=crossed.robust[:k, :k].mean(-1).tolist(),
        n=crossed.natural.shape[-1],
        attack=evaluator.attack_record,
        digests=[t.digest for t in tickets],
        provenance=provenance(),
    )
