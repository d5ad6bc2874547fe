"""Write an attack: a frozen dataclass of settings with a `start` and a `step`, and run it beside AutoAttack's.

    python examples/own_attack.py

Projected gradient ascent of the difference of logits, in steps that shrink to zero. To have it in the command as well,
it goes into a file of `rst_jax/attacks/` and a line of the table in `rst_jax/evaluation/suites.py`. Prints a card; half
a minute on two cores.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from sklearn.datasets import load_digits

import rst_jax
from rst_jax.attacks import Attack, Found, Problem
from rst_jax.attacks.attack import ascent
from rst_jax.losses import dlr


class ShrinkingState(NamedTuple):
    """Of each example: what was found, and where to look next."""

    found: Found
    x: jax.Array


@dataclasses.dataclass(frozen=True)
class Shrinking(Attack):
    """From the clean image, steps of 2 eps (1 - i / steps) along the ascent of DLR; success at any iterate counts."""

    steps: int = 50
    rounds: int = 1
    name = "Shrinking"

    def start(self, p: Problem, sampled: Any) -> ShrinkingState:
        """Begin at the clean image (on the host, in NumPy)."""
        return ShrinkingState(Found.clean(p), p.images)

    def step(self, p: Problem, s: ShrinkingState, i: jax.Array, sampled: Any) -> ShrinkingState:
        """Look, then take a projected step (in a compiled program)."""
        _, logits, gradient = ascent(p, s.x, lambda z: dlr(z, p.labels))
        size = 2 * p.threat.eps * (1 - i / self.steps)
        x = p.threat.ascend(s.x, gradient, size.astype(s.x.dtype), p.images)
        return ShrinkingState(s.found.seen(p, s.x, logits, gradient), x)


def main() -> None:
    """Attack the zoo's ticket of ratio 0.3 on the first 60 test digits."""
    ticket = rst_jax.load_ticket(next((Path(__file__).parent.parent / "zoo").glob("digits-*-0.3-*.ticket")))
    bunch = load_digits()
    test = np.arange(len(bunch.target)) % 5 == 0
    images, labels = (bunch.images[test][:60, ..., None] / 16).astype(np.float32), bunch.target[test][:60]
    card = rst_jax.evaluate(ticket, images, labels, rst_jax.ThreatModel(0.12), attacks=[Shrinking(), "apgd-ce"])
    print(card)


if __name__ == "__main__":
    main()
