"""Attacks over whole sets of images: one row of a card after the other.

A row is a cascade: each attack meets the examples that the ones before have left standing. Its rounds (restarts,
targets) are cut into batches, padded to one of a few sizes; each attack is compiled once a size for all rows, radii
and networks of one shape, and a new size only where it saves more than its compilation costs. Every finished batch is
written down, so a kill loses at most one, and since the batches follow from what was found before, a resumed row is the
row that was never stopped.

What an attack claims is run again by another program at another batch size, in float32 at the highest precision, and
checked against ball and box in float64. What fails is not counted, and the example goes on to the next attack.
"""

import contextlib
import dataclasses
import io
import math
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from rst_jax.attacks.attack import Attack, Problem
from rst_jax.evaluation.evidence import Evidence, Examples
from rst_jax.evaluation.programs import Apply, Fixed, Programs
from rst_jax.losses import correct, margin
from rst_jax.runtime import preemption
from rst_jax.runtime.files import read_arrays, write_arrays
from rst_jax.runtime.mesh import fetch, from_main, is_main, make_tree, replicate, split_rows
from rst_jax.runtime.progress import progress
from rst_jax.threat import ThreatModel, pixels

Tree = Any
_LOOKS = 10  # times a round, at most, that the host looks whether all examples are broken
_PARTS = 16  # of the batch size; a batch is padded to a number of them


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


class Driver:
    """Runs rows. Programs are compiled when first needed and kept.

    Args:
      mesh: all devices.
      batch_size: examples a program takes at most (but two a device at least: XLA computes one row by itself in another
        order).
      key: key data uint32 [2]; the randomness of an example follows from its id, the attack and the round.

    Attributes:
      sizes: of batches, in ascending order.
      programs: made when first needed, and kept.
      seconds: spent in each attack, compilation and verification included.
    """

    def __init__(self, mesh: Mesh, batch_size: int, key: np.ndarray):
        self.mesh, self.key = mesh, np.asarray(key, np.uint32)
        a_device = {max(-(-batch_size * part // (_PARTS * mesh.size)), 2) for part in range(1, _PARTS + 1)}
        self.sizes = [rows * mesh.size for rows in sorted(a_device)]
        self.programs = Programs(mesh)
        self._used = set[int]()
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
        with contextlib.closing(_Bar(row, evidence, order.shape[-1])) as bar:
            for number, rounds, index, left, pieces in self._plan(row, order.shape[-1], evidence, folder):
                attack, whose = row.attacks[number], {"index": index, "rounds": rounds}
                done = _kept(pieces, whose)
                if done is None:
                    if preemption.asked():
                        raise preemption.Preempted
                    target = order[index, rounds + 1] if attack.targeted else np.full_like(rounds, -1)
                    began = time.monotonic()
                    size = self._size(len(index), attack, classifier, examples.images, left)
                    rows = (index, rounds, target)
                    done = self._batch(attack, row.threat, classifier, variables, examples, rows, size, bar.tick)
                    self.seconds[attack.name] = self.seconds.get(attack.name, 0.0) + time.monotonic() - began
                    if pieces and is_main():
                        write_arrays(pieces, {**whose, **done})
                evidence.enter(number, rounds, index, done)
                bar.update(number, rounds, index)
        if whole and is_main():
            write_arrays(whole, vars(evidence))
            shutil.rmtree(whole.parent / "batches", ignore_errors=True)
        return evidence

    def _plan(
        self, row: Row, classes: int, evidence: Evidence, folder: Path | None
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray, int, Path | None]]:
        """The batches to come; they follow from what was found before.

        Of each: the attack's number, rounds and examples [n], how many such are left of the attack if nothing more
        breaks, and the file.
        """
        for number, attack in enumerate(row.attacks):
            every = np.arange(attack.rounds_of(classes), dtype=np.int32)
            turns = every[:, None] if attack.near == np.inf else every[None]
            for turn, rounds in enumerate(turns):
                pending = evidence.pending(attack)
                index, rounds = np.repeat(pending, len(rounds)), np.tile(rounds, len(pending))
                count = -(-len(index) // self.sizes[-1])
                for place, part in enumerate(np.array_split(np.arange(len(index)), count) if count else ()):
                    file = folder / "batches" / f"{number}-{turn}-{place}.npz" if folder else None
                    yield number, rounds[part], index[part], (len(turns) - turn) * count - place, file

    def _batch(
        self,
        attack: Attack,
        threat: ThreatModel,
        classifier: Classifier,
        variables: Tree,
        examples: Examples,
        rows: tuple[np.ndarray, np.ndarray, np.ndarray],
        size: int,
        tick: Callable[[int], None],
    ) -> dict[str, np.ndarray]:
        """One round of an attack on n examples, padded to `size` and verified; `tick` hears of the passes.

        `rows`: numbers of the examples, rounds and targets, [n] each.
        """
        index, _, target = rows
        n, images, labels = len(index), examples.images[index], examples.labels[index]

        def made(part: slice) -> tuple:
            i, rounds, target = (np.pad(r, (0, size - n), "edge")[part] for r in rows)
            keys = self._keys(attack, rounds, examples.ids[i])
            there = (examples.images[i], examples.logits[i], examples.labels[i], target, keys)
            p = Problem(partial(classifier.apply, variables), threat, *there)
            first, each = attack.draw(p)
            return there, each, attack.start(p, first)

        with jax.default_matmul_precision("highest"):
            there, drawn, state = make_tree(size, made, self.mesh)
            fixed = (variables, replicate(np.float32(threat.eps), self.mesh), *there)
            state = self._walk(attack, threat, classifier, fixed, drawn, state, n, tick)
            minimal = {"image": state.image} if hasattr(state, "image") else {}
            got = {name: value[:n] for name, value in fetch({**state.found._asdict(), **minimal}).items()}
        claimed, adversarial = got["broken"], got["adversarial"]
        held, finite = np.zeros(n, bool), np.isfinite(adversarial).all(axis=pixels(adversarial))
        margins, distance, prediction = np.zeros(n, np.float32), np.zeros(n, np.float32), np.zeros(n, np.int32)
        if claimed.any():
            logits = self.logits(classifier, adversarial[claimed], another=True)
            exact = adversarial[claimed].astype(np.float64), images[claimed].astype(np.float64)
            finite[claimed] &= np.isfinite(logits).all(-1)
            held[claimed] = ~correct(logits, labels[claimed]) & finite[claimed] & ~threat.violations(*exact)
            margins[claimed], prediction[claimed] = margin(logits, labels[claimed]), np.argmax(logits, -1)
            distance[claimed] = threat.distance(*exact)
        done = {
            "held": held,
            "target": target,
            "prediction": prediction,
            "margin": margins,
            "closest": np.full(n, np.inf, np.float32),
            "least": got["least"],
            "queries": got["queries"],
            "gradients": got["gradients"],
            "flat": got["flat"],
            "adversarial": adversarial[held],
            "distance": distance,
            "unverified": np.asarray(int((claimed & ~held).sum()), np.int32),
            "not_finite": np.asarray(int((~finite).sum()), np.int32),
        }
        if minimal:  # the closest image, wherever it is in the box
            image, anywhere = got["image"], ThreatModel(math.inf, "l2", threat.lower, threat.upper)
            moved = (image != images).any(axis=pixels(images))
            near = ~correct(self.logits(classifier, image, another=True), labels)
            exact = image.astype(np.float64), images.astype(np.float64)
            near &= ~anywhere.violations(*exact)
            done["closest"] = np.where(near, anywhere.distance(*exact), np.inf).astype(np.float32)
            done["unverified"] += np.int32((moved & ~near).sum())
        return done

    def _walk(
        self,
        attack: Attack,
        threat: ThreatModel,
        classifier: Classifier,
        fixed: Fixed,
        drawn: Tree,
        state: Tree,
        n: int,
        tick: Callable[[int], None],
    ) -> Any:
        """The state after a round on placed rows, the first n of which are real; stops when all of these are broken."""
        go_on, i = self.programs.attack(attack, threat, classifier.apply, fixed), self._number(0)
        work = len(fixed[2]) * self._operations(attack, classifier, fixed[2])
        looks = math.ceil(min(max(work / self.programs.worth, 1), _LOOKS))  # each costs a wait
        look, one_by_one = -(-attack.passes // looks), self.programs.one_by_one(attack, classifier.apply, fixed)
        for first in range(0, attack.passes, look):
            if first and attack.rests and fetch(state.found.broken)[:n].all():
                break
            last = min(first + look, attack.passes)
            end = self._number(last)
            for _ in range(last - first if one_by_one else 1):
                state, i = go_on(*fixed, drawn, state, i, end)
            tick((last - first) * n)
        return state

    def _size(self, examples: int, attack: Attack, classifier: Classifier, images: np.ndarray, left: int) -> int:
        """How many rows the program takes that is to hold so many examples, in `left` batches.

        The smallest size; or one that was used before, if to compute the rows too many costs less than to compile.
        """
        fits = next(size for size in self.sizes if size >= examples)
        used = min((size for size in self._used if size >= fits), default=fits)
        spare = (used - fits) * left
        cheap = not spare or spare * self._operations(attack, classifier, images) <= self.programs.worth
        size = used if cheap else fits
        self._used.add(size)
        return size

    def _operations(self, attack: Attack, classifier: Classifier, images: Any) -> float:
        """What a round of an attack needs for one of `images`."""
        forward = self.programs.operations(classifier.apply, classifier.variables, images)
        return attack.passes * forward * (3 if attack.needs_gradient else 1)

    def _keys(self, attack: Attack, rounds: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Key data uint32 [n, 2] of examples in rounds of an attack: two words of the seed, the second with the id."""
        seed = [*self.key, zlib.crc32(attack.name.encode())]
        words = {r: np.random.SeedSequence([*seed, r]).generate_state(2) for r in np.unique(rounds)}
        keys = np.stack([words[r] for r in rounds])
        keys[:, 1] ^= ids.astype(np.uint32)
        return keys

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

    def __init__(self, row: Row, evidence: Evidence, classes: int):
        self.row, self.evidence, self.bar, self.ticked = row, evidence, progress(1, 0, row.name, "pass"), 0
        self.rounds = [attack.rounds_of(classes) for attack in row.attacks]
        self._show(0, len(evidence.pending(row.attacks[0])) * self.rounds[0])

    def _show(self, number: int, left: int) -> None:
        bar: tqdm = self.bar
        broken, standing = int((self.evidence.attack >= 0).sum()), int(self.evidence.standing.sum())
        now = self.row.attacks[number]
        later = list(zip(self.row.attacks, self.rounds, strict=True))[number + 1 :]
        work = [attack.passes * rounds * len(self.evidence.pending(attack)) for attack, rounds in later]
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
        later, now = int((pending > index[-1]).sum()), len(pending) * (self.rounds[number] - 1 - int(rounds[-1]))
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
