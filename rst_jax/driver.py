"""Attacks over whole sets of images: one row of a card after the other.

A row is a cascade: each attack meets the examples that the ones before have left standing. Its rounds (restarts,
targets) are cut into batches, padded to one of a few sizes; each attack is compiled once a size for all rows, radii
and networks of one shape. Every finished batch is written down, so a kill loses at most one, and since the batches
follow from what was found before, a resumed row is the row that was never stopped.

What an attack claims is run again by another program at another batch size, in float32 at the highest precision, and
checked against ball and box in float64. What fails is not counted, and the example goes on to the next attack.
"""

import contextlib
import dataclasses
import io
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from rst_jax import preemption
from rst_jax.attacks.attack import Attack
from rst_jax.mesh import fetch, from_main, is_main, replicate, split_rows
from rst_jax.metrics import progress
from rst_jax.programs import Apply, Fixed, Programs
from rst_jax.records import read_arrays, write_arrays
from rst_jax.threat import ThreatModel

Tree = Any
_LOOKS = 10  # times a round that the host looks whether all examples are broken
_TOLERANCE = 1e-6  # of ball and box: the rounding of float32 images
STANDING, WRONG = -1, -2  # in place of an attack's number


@dataclasses.dataclass(frozen=True)
class Classifier:
    """What is attacked: `apply(variables, images [N, H, W, C]) -> logits [N, classes]`.

    Attributes:
      apply: one function for all networks of one shape, so that they share programs.
      variables: its first argument.
    """

    apply: Apply
    variables: Tree = ()


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of a card: attacks in cascade under one threat model.

    Attributes:
      name: as in tables.
      attacks: in order.
      threat: norm, eps, box.
      examples: only the first so many; 0: all.
    """

    name: str
    attacks: tuple[Attack, ...]
    threat: ThreatModel
    examples: int = 0


@dataclasses.dataclass(frozen=True)
class Examples:
    """What a row is measured on: images float32 [n, H, W, C] in [0, 1], labels and ids int32 [n], clean logits."""

    images: np.ndarray
    labels: np.ndarray
    ids: np.ndarray
    logits: np.ndarray

    def first(self, n: int) -> "Examples":
        """The first n of them; all for 0."""
        return Examples(*(field[: n or None] for field in (self.images, self.labels, self.ids, self.logits)))

    @property
    def right(self) -> np.ndarray:
        """Which are classified right: bool [n]."""
        return correct(self.logits, self.labels)


@dataclasses.dataclass
class Evidence:
    """What a row has found, example by example; every array is [n].

    Attributes:
      attack: number of the attack that broke it; STANDING, or WRONG without any attack.
      round: of that attack. target: the class it aimed at, or -1.
      prediction: what the adversarial image is taken for.
      clean: margin of the clean image.
      margin: of the verified adversarial image (of the clean one if there is none).
      distance: how far it was moved, in the row's norm.
      least: the smallest margin of any image looked at within the ball (not of all attacks' images: see `Found`).
      closest: the distance of the closest adversarial image that a minimal-norm attack found, whatever eps; else inf.
      queries, gradients: passes spent on it. flat: gradients that were zero.
      adversarial: float32 [n, H, W, C], the clean image where there is none.
      unverified: claims that did not hold, of each attack. not_finite: images or logits that were not.
    """

    attack: np.ndarray
    round: np.ndarray
    target: np.ndarray
    prediction: np.ndarray
    clean: np.ndarray
    margin: np.ndarray
    distance: np.ndarray
    least: np.ndarray
    closest: np.ndarray
    queries: np.ndarray
    gradients: np.ndarray
    flat: np.ndarray
    adversarial: np.ndarray
    unverified: np.ndarray
    not_finite: np.ndarray

    @classmethod
    def none(cls, examples: Examples, attacks: int) -> "Evidence":
        """Before the first attack."""
        n = len(examples.labels)
        return cls(
            attack=np.where(examples.right, STANDING, WRONG).astype(np.int16),
            round=np.full(n, -1, np.int16),
            target=np.full(n, -1, np.int32),
            prediction=np.argmax(examples.logits, -1).astype(np.int32),
            clean=margins(examples.logits, examples.labels),
            margin=margins(examples.logits, examples.labels),
            distance=np.zeros(n, np.float32),
            least=margins(examples.logits, examples.labels),
            closest=np.full(n, np.inf, np.float32),
            queries=np.zeros(n, np.int32),
            gradients=np.zeros(n, np.int32),
            flat=np.zeros(n, np.int32),
            adversarial=examples.images.copy(),
            unverified=np.zeros(attacks, np.int32),
            not_finite=np.zeros(attacks, np.int32),
        )

    @property
    def standing(self) -> np.ndarray:
        """Which examples no attack has broken: bool [n]."""
        return self.attack == STANDING

    def pending(self, attack: Attack) -> np.ndarray:
        """Whom an attack would meet now: their numbers, in order."""
        if attack.near == np.inf:  # also those whose clean margin is 0
            return np.flatnonzero(self.standing)
        return np.flatnonzero(self.standing & (self.least <= attack.near * self.clean))


class Driver:
    """Runs rows. Programs are compiled when first needed and kept.

    Args:
      mesh: all devices.
      batch_size: examples a program takes at most.
      key: key data uint32 [2]; the randomness of an example follows from its id, the attack and the round.

    Attributes:
      programs: made when first needed, and kept.
      seconds: spent in each attack, compilation and verification included.
    """

    def __init__(self, mesh: Mesh, batch_size: int, key: np.ndarray):
        self.mesh, self.key = mesh, np.asarray(key, np.uint32)
        parts = (1, 3 / 4, 1 / 2, 1 / 4, 1 / 16)
        self.sizes = sorted({-(-max(round(batch_size * part), 1) // mesh.size) * mesh.size for part in parts})
        self.programs = Programs(mesh)
        self.seconds: dict[str, float] = {}
        self._numbers: dict[int, jax.Array] = {}

    def logits(self, classifier: Classifier, images: np.ndarray, another: bool = False) -> np.ndarray:
        """Logits [n, classes] of images [n, H, W, C]; `another`: by the program of another batch size."""
        size = self.sizes[-1]
        if another:
            step = self.mesh.size
            size = next(s for s in range(-(-2 * size // 3 // step) * step, 3 * size, step) if s and s not in self.sizes)
        predict = self.programs.logits(classifier.apply)
        variables = replicate(classifier.variables, self.mesh)
        found = []
        with jax.default_matmul_precision("highest"):
            for first in range(0, len(images), size):
                rows = images[first : first + size]
                found.append(fetch(predict(variables, self._place(rows, size)))[: len(rows)])
        return np.concatenate(found)

    def run(
        self,
        row: Row,
        classifier: Classifier,
        examples: Examples,
        folder: Path | None = None,
    ) -> Evidence:
        """Run a row on its examples.

        Args:
          row: which attacks, which threat model.
          classifier: what is attacked.
          examples: the images; only those classified right are attacked.
          folder: where finished batches and the finished row are kept; what lies there is not done again. The caller
            answers for its belonging to the same question.

        Raises:
          Preempted: the process was asked to stop; between two batches it does.
        """
        examples = examples.first(row.examples)
        evidence = Evidence.none(examples, len(row.attacks))
        whole = folder / "row.npz" if folder else None
        if kept := _kept(whole):
            return Evidence(**kept)
        order = np.argsort(-examples.logits, axis=-1, kind="stable").astype(np.int32)
        variables = replicate(classifier.variables, self.mesh)
        with contextlib.closing(_Bar(row, evidence)) as bar:
            for number, rounds, index, pieces in self._plan(row, order.shape[-1], evidence, folder):
                attack, done = row.attacks[number], _kept(pieces, index)
                if done is None:
                    if preemption.asked():
                        raise preemption.Preempted
                    e, target = examples, order[index, rounds + 1] if attack.targeted else np.full_like(rounds, -1)
                    rows = (e.images[index], e.logits[index], e.labels[index], target, rounds, e.ids[index])
                    began = time.monotonic()
                    done = self._batch(attack, row.threat, classifier, variables, rows, bar.tick)
                    self.seconds[attack.name] = self.seconds.get(attack.name, 0.0) + time.monotonic() - began
                    if pieces and is_main():
                        write_arrays(pieces, {"index": index, **done})
                _enter(evidence, number, rounds, index, done)
                bar.update(number, rounds, index)
        if whole and is_main():
            write_arrays(whole, vars(evidence))
            shutil.rmtree(whole.parent / "batches", ignore_errors=True)
        return evidence

    def _plan(
        self, row: Row, classes: int, evidence: Evidence, folder: Path | None
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray, Path | None]]:
        """The batches to come: an attack's number, rounds and examples [n]; they follow from what was found before."""
        largest = 0
        for number, attack in enumerate(row.attacks):
            every = np.arange(min(attack.rounds, classes - 1) if attack.targeted else attack.rounds, dtype=np.int32)
            for rounds in every[:, None] if attack.near == np.inf else every[None]:
                pending = evidence.pending(attack)
                index, rounds = np.repeat(pending, len(rounds)), np.tile(rounds, len(pending))
                count = -(-len(index) // (largest or self.sizes[-1]))
                if number and count and not largest:
                    largest = self._size(-(-len(index) // count))  # so that what follows the first attack shares a size
                for place, part in enumerate(np.array_split(np.arange(len(index)), count) if count else ()):
                    name = f"{number}-{rounds[0]}-{place}.npz"
                    yield number, rounds[part], index[part], folder / "batches" / name if folder else None

    def _batch(
        self,
        attack: Attack,
        threat: ThreatModel,
        classifier: Classifier,
        variables: Tree,
        rows: tuple[np.ndarray, ...],
        tick: Callable[[int], None],
    ) -> dict[str, np.ndarray]:
        """One round of an attack on at most a batch of examples, verified; `tick` hears of the passes."""
        images, _, labels, target, *_ = rows
        n, size = len(labels), self._size(len(labels))
        tag = zlib.crc32(attack.name.encode())
        key = jax.random.fold_in(jax.random.wrap_key_data(jnp.asarray(self.key)), tag)
        with jax.default_matmul_precision("highest"):
            *placed, rounds, ids = (self._place(r, size) for r in rows)
            eps, key = replicate((np.float32(threat.eps), np.asarray(jax.random.key_data(key))), self.mesh)
            fixed = (variables, eps, *placed, self.programs.keys()(key, rounds, ids))
            state = self._walk(attack, threat, classifier, fixed, n, tick)
            found, extra = state.found, {name: getattr(state, name, None) for name in ("closest", "image")}
            fields = {**found._asdict(), **{name: value for name, value in extra.items() if value is not None}}
            got = {name: value[:n] for name, value in fetch(fields).items()}
        claimed, adversarial = got["broken"], got["adversarial"]
        held, finite = np.zeros(n, bool), np.isfinite(adversarial).all(axis=tuple(range(1, adversarial.ndim)))
        margin, prediction = np.zeros(n, np.float32), np.zeros(n, np.int32)
        if claimed.any():
            logits = self.logits(classifier, adversarial[claimed], another=True)
            finite[claimed] &= np.isfinite(logits).all(-1)
            right = correct(logits, labels[claimed])
            held[claimed] = ~right & finite[claimed] & within(threat, adversarial[claimed], images[claimed])
            margin[claimed] = margins(logits, labels[claimed])
            prediction[claimed] = np.argmax(logits, -1)
        done = {
            "held": held,
            "target": target,
            "prediction": prediction,
            "margin": margin,
            "closest": np.full(n, np.inf, np.float32),
            "least": got["least"],
            "queries": got["queries"],
            "gradients": got["gradients"],
            "flat": got["flat"],
            "adversarial": adversarial[held],
            "distance": distances(threat, adversarial, images).astype(np.float32),
            "unverified": np.asarray(int((claimed & ~held).sum()), np.int32),
            "not_finite": np.asarray(int((~finite).sum()), np.int32),
        }
        if "image" in got:
            near = np.isfinite(got["closest"])
            if near.any():
                near[near] = ~correct(self.logits(classifier, got["image"][near], another=True), labels[near])
            done["closest"] = np.where(near, got["closest"], np.inf).astype(np.float32)
        return done

    def _walk(
        self,
        attack: Attack,
        threat: ThreatModel,
        classifier: Classifier,
        fixed: Fixed,
        n: int,
        tick: Callable[[int], None],
    ) -> Any:
        """The state after a round on placed rows, the first n of which are real; stops when all of these are broken."""
        begin, go_on = self.programs.attack(attack, threat, classifier.apply, fixed)
        (state, drawn), i = begin(*fixed), self._number(0)
        look, one_by_one = -(-attack.passes // _LOOKS), self.programs.one_by_one(classifier.apply, fixed)
        for first in range(0, attack.passes, look):
            if attack.rests and fetch(state.found.broken)[:n].all():
                break
            last = min(first + look, attack.passes)
            end = self._number(last)
            for _ in range(last - first if one_by_one else 1):
                state, i = go_on(*fixed, drawn, state, i, end)
            tick((last - first) * n)
        return state

    def _size(self, examples: int) -> int:
        """How many rows a program takes that is to hold so many examples."""
        return next(size for size in self.sizes if size >= examples)

    def _number(self, value: int) -> jax.Array:
        """An integer on all devices."""
        if value not in self._numbers:
            self._numbers[value] = replicate(np.int32(value), self.mesh)
        return self._numbers[value]

    def _place(self, rows: np.ndarray, size: int) -> jax.Array:
        """Rows on the devices, padded with the last one to `size`."""
        padding = np.repeat(rows[-1:], size - len(rows), axis=0)
        return split_rows(np.concatenate([rows, padding]), self.mesh)


class _Bar:
    """Passes done and to come, and how many examples are broken."""

    def __init__(self, row: Row, evidence: Evidence):
        self.row, self.evidence, self.bar, self.ticked = row, evidence, progress(1, 0, row.name, "pass"), 0
        self._show(0, len(evidence.pending(row.attacks[0])) * row.attacks[0].rounds)

    def _show(self, number: int, left: int) -> None:
        bar: tqdm = self.bar
        broken, standing = int((self.evidence.attack >= 0).sum()), int(self.evidence.standing.sum())
        now = self.row.attacks[number]
        work = [a.passes * a.rounds * len(self.evidence.pending(a)) for a in self.row.attacks[number + 1 :]]
        bar.total = bar.n + sum(work) + now.passes * left
        bar.set_postfix_str(f"{now.name}, {broken} broken, {standing} stand")

    def tick(self, passes: int) -> None:
        """So many more within a batch."""
        self.ticked += passes
        self.bar.update(passes)

    def update(self, number: int, rounds: np.ndarray, index: np.ndarray) -> None:
        """After a batch."""
        attack, pending = self.row.attacks[number], self.evidence.pending(self.row.attacks[number])
        self.bar.update(attack.passes * len(index) - self.ticked)
        self.ticked = 0
        later, now = int((pending > index[-1]).sum()), len(pending) * (attack.rounds - 1 - int(rounds[-1]))
        self._show(number, later * (attack.rounds if attack.near < np.inf else 1) + now)

    def close(self) -> None:
        """Take it away."""
        self.bar.close()


def _enter(evidence: Evidence, number: int, rounds: np.ndarray, index: np.ndarray, done: dict[str, np.ndarray]) -> None:
    """Write a batch's findings into a row's: of the rounds of an example, the first that broke it."""
    for name in ("queries", "gradients", "flat"):
        np.add.at(getattr(evidence, name), index, done[name])
    for name in ("least", "closest"):
        np.fmin.at(getattr(evidence, name), index, done[name])
    held = np.flatnonzero(done["held"])
    broken, first = np.unique(index[held], return_index=True)
    new = evidence.standing[broken]
    broken, first = broken[new], first[new]
    for name in ("target", "prediction", "margin", "distance"):
        getattr(evidence, name)[broken] = done[name][held[first]]
    evidence.attack[broken], evidence.round[broken] = number, rounds[held[first]]
    evidence.adversarial[broken] = done["adversarial"][first]
    evidence.unverified[number] += done["unverified"]
    evidence.not_finite[number] += done["not_finite"]


def _kept(path: Path | None, index: np.ndarray | None = None) -> dict[str, np.ndarray] | None:
    """The arrays kept in a file, seen alike by all processes; None where there are none or they are of others."""
    found = None
    if path and is_main():
        with contextlib.suppress(ValueError):
            found = read_arrays(path)
    if found is not None and index is not None and not np.array_equal(found.get("index", ()), index):
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


def correct(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Which logits [n, classes] name the label: bool [n]; logits that are not finite name none."""
    return (np.argmax(logits, -1) == labels) & np.isfinite(logits).all(-1)


def margins(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """As `losses.margin`, on the host: float32 [n]."""
    rows = np.arange(len(labels))
    others = logits.astype(np.float32)
    mine = others[rows, labels]
    others[rows, labels] = -np.inf
    return mine - others.max(-1)


def distances(threat: ThreatModel, adversarial: np.ndarray, images: np.ndarray) -> np.ndarray:
    """How far images were moved, in the threat model's norm: float64 [n]."""
    delta = (adversarial.astype(np.float64) - images.astype(np.float64)).reshape(len(images), -1)
    return np.abs(delta).max(-1, initial=0) if threat.norm == "linf" else np.linalg.norm(delta, axis=-1)


def within(threat: ThreatModel, adversarial: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Which adversarial images lie in ball and box, computed in float64: bool [n]."""
    axes = tuple(range(1, images.ndim))
    inside = (adversarial >= threat.lower - _TOLERANCE) & (adversarial <= threat.upper + _TOLERANCE)
    return inside.all(axis=axes) & (distances(threat, adversarial, images) <= float(threat.eps) + _TOLERANCE)
