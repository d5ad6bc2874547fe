"""One batch of examples in one attack: placed, attacked, and judged again.

What an attack claims is run again by another program at another batch size, in float32 at the highest precision, and
checked against ball and box in float64.
"""

import dataclasses
import math
import time
import zlib
from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from jaxtyping import PyTree

from rst_jax.attacks.attack import Attack, Problem
from rst_jax.evaluation.classifier import Classifier
from rst_jax.evaluation.evidence import Examples
from rst_jax.evaluation.programs import Fixed, Programs, violations
from rst_jax.losses import correct, margin
from rst_jax.runtime.mesh import fetch, make_tree, replicate
from rst_jax.threat import ThreatModel, pixels

_LOOKS = 10  # times a round that the host looks whether all examples are broken; of a toy it looks once


@dataclasses.dataclass(frozen=True)
class Batch:
    """Examples of one turn of an attack, which a program takes together.

    Attributes:
      name: of its file.
      number: the attack's in its cascade.
      index: the examples' numbers, [n]; one may be there in several rounds. rounds: [n].
      targets: classes aimed at, or -1, [n].
      size: rows of the program; those after the first n repeat the last.
    """

    name: str
    number: int
    index: np.ndarray
    rounds: np.ndarray
    targets: np.ndarray
    size: int

    def padded(self, rows: np.ndarray) -> np.ndarray:
        """[n, ...] as [size, ...]."""
        return np.pad(rows, [(0, self.size - len(rows)), *[(0, 0)] * (rows.ndim - 1)], "edge")

    @property
    def whose(self) -> dict[str, np.ndarray]:
        """What must be the same for its file to be taken."""
        return {"index": self.index, "rounds": self.rounds}


class Attacker:
    """Attacks the examples of one classifier, batch by batch.

    Args:
      programs: compiled when first needed; they may be shared between classifiers of one shape.
      classifier: what is attacked.
      examples: with images.
      key: key data uint32 [2]; the randomness of an example follows from its id, the attack and the round.

    Attributes:
      toy: see `Programs.toy`; a toy is asked for in one call a round, and its batches all have the largest size.
      sizes: of batches, in ascending order.
      seconds: spent in each attack, compilation and verification included.
    """

    def __init__(self, programs: Programs, classifier: Classifier, examples: Examples, key: np.ndarray):
        self.programs, self.classifier, self.examples = programs, programs.placed(classifier), examples
        self.mesh, self.key = programs.mesh, np.asarray(key, np.uint32)
        self.toy = programs.toy(self.classifier.apply, self.classifier.variables, examples.image_shape)
        self.sizes = programs.sizes(len(examples))[-1 if self.toy else 0 :]
        self.seconds: dict[str, float] = {}
        self._numbers: dict[int, jax.Array] = {}

    def logits(self, images: np.ndarray, another: bool = False) -> np.ndarray:
        """Logits [k, classes] of images [k, H, W, C]; `another`: by the program of another batch size."""
        return self.programs.logits(self.classifier, images, len(self.examples), another)

    def attack(
        self, attack: Attack, threat: ThreatModel, batch: Batch, tick: Callable[[int], None]
    ) -> dict[str, np.ndarray]:
        """Attack a batch and verify what is claimed; `tick` hears of the passes.

        Returns:
          What `Evidence.enter` takes.
        """
        n, images, began = len(batch.index), self.examples.read(batch.index), time.monotonic()
        with jax.default_matmul_precision("highest"):
            fixed, sampled, state = self._placed(attack, threat, batch, images)
            apply = self.classifier.apply
            go_on = partial(self.programs.attack(attack, threat, apply, fixed), *fixed, sampled)
            state = self._walk(attack, go_on, state, n, tick, self.programs.one_by_one(attack, apply, fixed))
            minimal = {"image": state.image} if hasattr(state, "image") else {}
            got = {name: value[:n] for name, value in fetch({**state.found._asdict(), **minimal}).items()}
        found = self._verified(threat, batch, images, got["broken"], got["adversarial"])
        found |= {name: got[name] for name in ("least", "queries", "gradients", "flat")}
        found |= {"target": batch.targets, "closest": np.full(n, np.inf, np.float32)}
        if minimal:
            found["closest"], boasted = self._closest(threat, batch, images, got["image"])
            found["unverified"] += boasted
        self.seconds[attack.name] = self.seconds.get(attack.name, 0.0) + time.monotonic() - began
        return found

    def _placed(
        self, attack: Attack, threat: ThreatModel, batch: Batch, images: np.ndarray
    ) -> tuple[Fixed, PyTree, PyTree]:
        """What a round begins with, on the devices: the fixed arguments, what is sampled, and the state."""
        variables = self.classifier.variables
        place, labels, ids = batch.padded(np.arange(len(batch.index))), self.examples.labels, self.examples.ids
        index, rounds, targets = map(batch.padded, (batch.index, batch.rounds, batch.targets))

        def made(part: slice) -> tuple:
            i = index[part]
            keys = self._keys(attack, rounds[part], ids[i])
            there = (images[place[part]], self.examples.logits[i], labels[i], targets[part], keys)
            p = Problem(partial(self.classifier.apply, variables), threat, *there)
            first, each = attack.sample(p)
            return there, each, attack.start(p, first)

        there, sampled, state = make_tree(batch.size, made, self.mesh)
        return (variables, replicate(np.float32(threat.eps), self.mesh), *there), sampled, state

    def _walk(
        self, attack: Attack, go_on: Callable, state: PyTree, n: int, tick: Callable[[int], None], one_by_one: bool
    ) -> PyTree:
        """The state after a round on placed rows, the first n of which are real; stops when all of these are broken."""
        i, look = self._number(0), -(-attack.passes // (1 if self.toy else _LOOKS))
        for first in range(0, attack.passes, look):
            if first and attack.rests and fetch(state.found.broken)[:n].all():
                break
            last = min(first + look, attack.passes)
            end = self._number(last)
            for _ in range(last - first if one_by_one else 1):
                state, i = go_on(state, i, end)
            tick((last - first) * n)
        return state

    def _verified(
        self, threat: ThreatModel, batch: Batch, images: np.ndarray, claimed: np.ndarray, adversarial: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Which claims hold, bool [n], and of these the images; what is found of each, and how many failed."""
        n, labels = len(batch.index), self.examples.labels[batch.index]
        held, failed = np.zeros(n, bool), np.zeros(n, bool)
        finite = np.isfinite(adversarial).all(axis=pixels(adversarial))
        margins, distance, prediction = np.zeros(n, np.float32), np.zeros(n, np.float32), np.zeros(n, np.int32)
        if claimed.any():
            clean, moved, label = images[claimed], adversarial[claimed], labels[claimed]
            logits = self.logits(moved, another=True)
            finite[claimed] &= np.isfinite(logits).all(-1)
            inside = finite[claimed] & ~violations(threat, moved, clean)
            held[claimed], failed[claimed] = ~correct(logits, label) & inside, ~inside
            margins[claimed], prediction[claimed] = margin(logits, label), np.argmax(logits, -1)
            distance[claimed] = threat.distance(moved.astype(np.float64), clean.astype(np.float64))
        return {
            "held": held,
            "prediction": prediction,
            "margin": margins,
            "adversarial": adversarial[held],
            "distance": distance,
            "failed": failed,
            "unverified": np.asarray(int((claimed & ~held).sum()), np.int32),
            "not_finite": np.asarray(int((~finite).sum()), np.int32),
        }

    def _closest(
        self, threat: ThreatModel, batch: Batch, images: np.ndarray, found: np.ndarray
    ) -> tuple[np.ndarray, np.int32]:
        """L2 distances [n] of the images that a minimal-norm attack found, wherever in the box; inf where none holds.

        And how many that were moved do not hold.
        """
        anywhere = ThreatModel(math.inf, "l2", threat.lower, threat.upper)
        moved = (found != images).any(axis=pixels(images))
        near = ~correct(self.logits(found, another=True), self.examples.labels[batch.index])
        near &= ~violations(anywhere, found, images)
        distance = anywhere.distance(found.astype(np.float64), images.astype(np.float64))
        return np.where(near, distance, np.inf).astype(np.float32), np.int32((moved & ~near).sum())

    def _keys(self, attack: Attack, rounds: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Key data uint32 [n, 2] of examples in rounds of an attack: two words of the seed, the second with the id."""
        seed = [*self.key, zlib.crc32(attack.stream.encode())]
        words = {r: np.random.SeedSequence([*seed, r]).generate_state(2) for r in np.unique(rounds)}
        keys = np.stack([words[r] for r in rounds])
        keys[:, 1] ^= ids.astype(np.uint32)
        return keys

    def _number(self, value: int) -> jax.Array:
        """An integer on all devices."""
        if value not in self._numbers:
            self._numbers[value] = replicate(np.int32(value), self.mesh)
        return self._numbers[value]
