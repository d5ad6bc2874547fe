"""Uniform noise from the ball: the baseline that every attack must beat."""

import dataclasses
from typing import NamedTuple

import jax

from rst_jax.attacks.attack import Found, Problem


class NoiseState(NamedTuple):
    """One draw an example."""

    found: Found


@dataclasses.dataclass(frozen=True)
class Noise:
    """Uniform draws from the ball, one a round."""

    rounds: int = 10
    steps = 0
    name = "noise"
    targeted = False
    needs_gradient = False
    rests = True

    def start(self, p: Problem) -> NoiseState:
        """One draw."""
        x = p.threat.project(p.images + p.threat.noise(p.keys, p.images), p.images)
        return NoiseState(Found.nothing(p).seen(p, x, p.logits_fn(x)))

    def step(self, p: Problem, s: NoiseState, i: jax.Array) -> NoiseState:
        """Nothing more."""
        return s
