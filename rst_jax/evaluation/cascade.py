"""Attacks in cascade over whole sets of images: each meets the examples that the ones before have left standing.

Its rounds (restarts, targets) are cut into batches, padded to one of a few sizes. Every finished batch is written down,
so a kill loses at most one, and since the batches follow from what was found before, a resumed cascade is the one that
was never stopped. Images are read batch by batch. What does not hold when run again is not counted, and the example
goes on to the next attack.
"""

import contextlib
import dataclasses
import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from rst_jax.attacks.attack import Attack
from rst_jax.evaluation.batch import Attacker, Batch
from rst_jax.evaluation.evidence import SHOWN, Evidence, Examples
from rst_jax.evaluation.images import ImageFile
from rst_jax.runtime import preemption
from rst_jax.runtime.files import read_arrays, write_arrays
from rst_jax.runtime.mesh import from_main, is_main
from rst_jax.runtime.progress import Progress
from rst_jax.threat import ThreatModel

# What a batch finds of each of its examples.
_OF_EACH = {"held", "prediction", "margin", "distance", "least", "queries", "gradients", "flat", "target", "closest"}


@dataclasses.dataclass(frozen=True)
class Cascade:
    """A line of a card: attacks one after the other under one threat model.

    Attributes:
      name: as in tables.
      attacks: in order.
      threat: norm, eps, box.
      examples: only the first so many; 0: all.
      folder: the name of its folder in the card's.
    """

    name: str
    attacks: tuple[Attack, ...]
    threat: ThreatModel
    examples: int = 0
    folder: str = ""


def run(attacker: Attacker, cascade: Cascade, folder: Path | None = None, keep_images: bool = False) -> Evidence:
    """Run a cascade on its examples, those that are classified right.

    Args:
      attacker: attacks the batches.
      cascade: which attacks, which threat model.
      folder: where finished batches and what the whole has found are kept; what lies there is not done again. The
        caller answers for its belonging to the same question.
      keep_images: keep the adversarial images of all broken examples: in `adversarial.npy` in the folder, in memory
        without one.

    Raises:
      Preempted: the process was asked to stop; between two batches it does.
    """
    examples, whole = attacker.examples.first(cascade.examples), folder / "row.npz" if folder else None
    file = ImageFile(folder / "adversarial.npy") if folder and keep_images and is_main() else None
    if file and whole and not file.path.exists():  # what lies there was made without
        whole.unlink(missing_ok=True)
    evidence, most = Evidence.none(examples, len(cascade.attacks)), None if keep_images and not folder else SHOWN
    if (kept := _kept(whole)) and (found := Evidence.of_arrays(kept, evidence)):
        _clear(folder)
        return found
    if file:
        file.make((len(examples), *examples.image_shape))
    with contextlib.closing(_Bar(cascade, evidence, examples.logits.shape[-1])) as bar:
        for batch in _plan(cascade, examples, evidence, attacker.sizes):
            done = _done(attacker, cascade, batch, folder, bar.tick)
            broken, images = evidence.enter(batch.number, batch.rounds, batch.index, done, most)
            if file:
                file.put(broken, images)
            bar.update(batch)
    if whole and is_main():
        write_arrays(whole, vars(evidence))
    _clear(folder)
    return evidence


def _clear(folder: Path | None) -> None:
    """Remove the batches of a cascade that is whole."""
    if folder and is_main():
        shutil.rmtree(folder / "batches", ignore_errors=True)


def _plan(cascade: Cascade, examples: Examples, evidence: Evidence, sizes: list[int]) -> Iterator[Batch]:
    """The batches to come; they follow from what was found before."""
    for number, attack in enumerate(cascade.attacks):
        every = np.arange(attack.rounds_of(examples.logits.shape[-1]), dtype=np.int32)
        for turn, rounds in enumerate(every[:, None] if attack.near == np.inf else every[None]):
            pending = evidence.pending(attack)
            index, rounds = np.repeat(pending, len(rounds)), np.tile(rounds, len(pending))
            for place, first in enumerate(range(0, len(index), sizes[-1])):
                part = slice(first, first + sizes[-1])
                size = next(size for size in sizes if size >= len(index[part]))
                targets = _targets(attack, examples.logits[index[part]], rounds[part])
                yield Batch(f"{number}-{turn}-{place}", number, index[part], rounds[part], targets, size)


def _targets(attack: Attack, logits: np.ndarray, rounds: np.ndarray) -> np.ndarray:
    """The class that each example aims at, int32 [n]: in round r that which ranks r + 2 in its clean logits, or -1."""
    if not attack.targeted:
        return np.full_like(rounds, -1)
    order = np.argsort(-logits, axis=-1, kind="stable").astype(np.int32)
    return order[np.arange(len(rounds)), rounds + 1]


def _done(
    attacker: Attacker, cascade: Cascade, batch: Batch, folder: Path | None, tick: Callable[[int], None]
) -> dict[str, np.ndarray]:
    """What a batch found, from its file if that is there."""
    file = folder / "batches" / f"{batch.name}.npz" if folder else None
    if (done := _kept(file, batch.whose)) is not None and _fits(done, len(batch.index)):
        return done
    if preemption.asked():
        raise preemption.Preempted
    done = attacker.attack(cascade.attacks[batch.number], cascade.threat, batch, tick)
    if file and is_main():
        write_arrays(file, {**batch.whose, **done})
    return done


def _fits(done: dict[str, np.ndarray], n: int) -> bool:
    """Whether a file holds what a batch of n examples finds."""
    if not _OF_EACH | {"adversarial", "unverified", "not_finite"} <= done.keys():
        return False
    rows = [done[name].shape == (n,) for name in _OF_EACH | ({"failed"} & done.keys())]
    return all(rows) and done["held"].dtype == bool and len(done["adversarial"]) == done["held"].sum()


class _Bar:
    """Passes done and to come, and how many examples are broken."""

    def __init__(self, cascade: Cascade, evidence: Evidence, classes: int):
        self.attacks, self.evidence, self.ticked = cascade.attacks, evidence, 0
        self.bar, self.about = Progress(1, 0, cascade.name, "passes"), ""
        self.rounds = [attack.rounds_of(classes) for attack in self.attacks]
        self._show(0, len(evidence.pending(self.attacks[0])) * self.rounds[0])

    def _show(self, number: int, left: int) -> None:
        bar = self.bar
        broken, standing = int((self.evidence.attack >= 0).sum()), int(self.evidence.standing.sum())
        now = self.attacks[number]
        later = list(zip(self.attacks, self.rounds, strict=True))[number + 1 :]
        work = [attack.passes * rounds * len(self.evidence.pending(attack)) for attack, rounds in later]
        bar.total = bar.n + sum(work) + now.passes * left
        self.about = f"{now.name}, {broken:,} broken, {standing:,} stand"
        bar.show(self.about)

    def tick(self, passes: int) -> None:
        """So many more within a batch."""
        self.ticked += passes
        self.bar.update(passes, lambda: self.about)

    def update(self, batch: Batch) -> None:
        """After a batch."""
        number, attack = batch.number, self.attacks[batch.number]
        pending = self.evidence.pending(attack)
        rest = attack.passes * len(batch.index) - self.ticked
        self.bar.update(rest, lambda: self.about) if self.ticked else self.bar.skip(rest)  # from its file
        self.ticked = 0
        later = int((pending > batch.index[-1]).sum())
        now = len(pending) * (self.rounds[number] - 1 - int(batch.rounds[-1]))
        self._show(number, later * (self.rounds[number] if attack.near < np.inf else 1) + now)

    def close(self) -> None:
        """Take it away."""
        self.bar.close()


def _kept(path: Path | None, whose: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray] | None:
    """The arrays kept in a file, seen alike by all processes; None where there are none or they are of others."""
    found = None
    if path and is_main():
        with contextlib.suppress(ValueError):
            found = read_arrays(path)
    if found is not None and whose and any(not np.array_equal(found.get(k, ()), v) for k, v in whose.items()):
        found = None
    return found if jax.process_count() == 1 else _shared(found)


def _shared(found: dict[str, np.ndarray] | None) -> dict[str, np.ndarray] | None:
    """A dict of arrays that the first process holds, on all of them."""
    buffer = io.BytesIO()
    if found is not None:
        np.savez(buffer, **found)  # type: ignore[arg-type]
    raw = np.frombuffer(buffer.getvalue(), np.uint8)
    size = int(from_main(np.asarray(len(raw), np.int64)))
    if not size:
        return None
    raw = from_main(raw if is_main() else np.zeros(size, np.uint8))
    with np.load(io.BytesIO(raw.tobytes())) as arrays:
        return {name: arrays[name] for name in arrays.files}
