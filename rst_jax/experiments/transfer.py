"""Crossing tickets: images made against one, judged by all (the paper's transfer matrix)."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import PyTree

from rst_jax.data import Dataset
from rst_jax.evaluation.accuracy import Evaluator
from rst_jax.experiments.run import Run
from rst_jax.records import AttackRecord, TransferRecord, provenance
from rst_jax.runtime import preemption
from rst_jax.runtime.files import among, read_arrays, write_arrays
from rst_jax.runtime.mesh import from_main, is_main, replicate
from rst_jax.tickets.ticket import Ticket

_SHOWN = 10
_FORMAT = 2  # of the files of flags; others are made again


@dataclasses.dataclass(frozen=True)
class Crossed:
    """Per-example flags on the test images.

    Attributes:
      natural: natural[k, n]: ticket k is right on clean image n.
      robust: robust[s, k, n]: ticket k is right on image n attacked through ticket s.
      violations: images a source that left the threat model.
      shown: shown[s]: a few images attacked through ticket s, to be looked at, and shown_index[s]: which.
    """

    natural: np.ndarray
    robust: np.ndarray
    violations: list[int]
    shown: list[np.ndarray]
    shown_index: list[np.ndarray]

    def among(self, places: Sequence[int]) -> "Crossed":
        """The flags of some tickets alone, in that order."""
        return Crossed(
            self.natural[places],
            self.robust[np.ix_(places, places)],
            [self.violations[k] for k in places],
            [self.shown[k] for k in places],
            [self.shown_index[k] for k in places],
        )


def transfer(run: Run) -> None:
    """The matrix over the drawn tickets: images made against one, judged by all.

    Needs the tickets (`search`, `dense`).
    """
    tickets = run.tickets()
    drawn = [place for place, ticket in enumerate(tickets) if ticket.kind == "scratch"]
    crossed = cross(run, tickets).among(drawn)
    run.keep("transfer", transfer_record(crossed, [tickets[place] for place in drawn], run.evaluator.attack_record))


def cross(run: Run, tickets: list[Ticket]) -> Crossed:
    """Attack every ticket on the test images and let every ticket judge.

    The flags of each source are kept in results/flags, so that what is finished is not done again; they are used
    only for the same tickets, attack and images.

    Raises:
      Preempted: the process was asked to stop; between two sources it does.
    """
    evaluator, dataset, folder = run.evaluator, run.dataset, run.workdir / "results" / "flags"
    stamp = "|".join([f"flags {_FORMAT}", str(evaluator.attack_record), dataset.digest, *(t.digest for t in tickets)])
    variables = [replicate(ticket.variables, evaluator.mesh) for ticket in tickets]
    done, blank = [], _blank(len(tickets), dataset.test.images.shape)
    for place, source in enumerate(tickets):
        if preemption.asked():
            raise preemption.Preempted
        path = folder / f"{source.name}.npz"
        flags = _read(path, stamp + source.digest, blank) if is_main() else None
        if not from_main(np.asarray(flags is not None)):
            flags = _flags(evaluator, place, variables, dataset)
            if is_main():
                write_arrays(path, {**flags, "stamp": np.asarray(stamp + source.digest)})
        else:
            flags = from_main(flags or blank)
        done.append(flags)
    return Crossed(
        np.stack([flags["natural"] for flags in done]),
        np.stack([flags["robust"] for flags in done]),
        [int(flags["violations"]) for flags in done],
        [flags["shown"] for flags in done],
        [flags["shown_index"] for flags in done],
    )


def _flags(evaluator: Evaluator, place: int, variables: list[PyTree], dataset: Dataset) -> dict[str, np.ndarray]:
    """The fields of `Crossed` for the ticket at `place`; of its adversarial images, only what is shown is kept."""
    n, end, outside = len(dataset.test), 0, 0
    natural, robust = np.zeros(n, bool), np.zeros((len(variables), n), bool)
    shown: dict[int, np.ndarray] = {}
    for batch in evaluator.judged(variables[place], variables, dataset.test):
        first, end = end, end + len(batch.natural)
        natural[first:end], robust[:, first:end] = batch.natural, batch.robust
        outside += batch.violations
        # What is worth showing of all images is among what is worth showing of the first so many, of any number.
        index = _worth_showing(natural[:end], robust[place, :end])
        if len(new := index[index >= first]):
            shown |= zip(new.tolist(), batch.adversarial[new - first], strict=True)
        shown = {i: shown[i] for i in index.tolist()}
    return {
        "natural": natural,
        "robust": robust,
        "violations": np.asarray(outside, np.int64),
        "shown": np.stack(list(shown.values())),
        "shown_index": np.asarray(list(shown), np.int64),
    }


def _worth_showing(natural: np.ndarray, robust: np.ndarray) -> np.ndarray:
    """The first images that the attack broke, at most half of what is shown, then the first that stood."""
    broken = np.flatnonzero(natural & ~robust)[: _SHOWN // 2]
    rest = np.setdiff1d(np.arange(len(natural)), broken)
    rest = rest[np.argsort(~robust[rest], kind="stable")]
    return np.concatenate([broken, rest])[:_SHOWN]


def _blank(tickets: int, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    n, shown = shape[0], min(_SHOWN, shape[0])
    return {
        "natural": np.zeros(n, bool),
        "robust": np.zeros((tickets, n), bool),
        "violations": np.zeros((), np.int64),
        "shown": np.zeros((shown, *shape[1:]), np.float32),
        "shown_index": np.zeros(shown, np.int64),
    }


def _read(path: Path, stamp: str, like: dict[str, np.ndarray]) -> dict[str, np.ndarray] | None:
    """What a file holds, if it is of these tickets, this attack and these images, and shaped `like` them."""
    try:
        found = read_arrays(path)
    except ValueError:
        return None
    same = str(found.pop("stamp", "")) == stamp and found.keys() == like.keys()
    same = same and all((a.shape, a.dtype) == (like[name].shape, like[name].dtype) for name, a in found.items())
    return found if same and among(found["shown_index"], like["natural"].size) else None


def transfer_record(crossed: Crossed, tickets: list[Ticket], attack: AttackRecord) -> TransferRecord:
    """The matrix over `tickets` from their flags."""
    return TransferRecord(
        names=[t.name for t in tickets],
        ratios=[t.remaining_ratio for t in tickets],
        natural=crossed.natural.mean(-1).tolist(),
        robust=crossed.robust.mean(-1).tolist(),
        n=crossed.natural.shape[-1],
        attack=attack,
        digests=[t.digest for t in tickets],
        provenance=provenance(),
    )
