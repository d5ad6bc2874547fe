"""Uniform noise from the ball: the baseline that every attack must beat."""

import dataclasses
from typing import NamedTuple

import jax
from jaxtyping import PyTree

from rst_jax.attacks.attack import Attack, Found, Problem, step_keys
from rst_jax.ranges import Positive


class NoiseState(NamedTuple):
    """What the samples have found."""

    found: Found


@dataclasses.dataclass(frozen=True)
class Noise(Attack):
    """Uniform samples from the ball.

    Attributes:
      draws: so many.
    """

    draws: Positive = 10
    rounds = 1
    name = "noise"
    needs_gradient = False

    @property
    def passes(self) -> int:
        """The samples."""
        return self.draws

    def start(self, p: Problem, sampled: PyTree = ()) -> NoiseState:
        """Nothing yet."""
        return NoiseState(Found.clean(p))

    def step(self, p: Problem, s: NoiseState, i: jax.Array, sampled: PyTree = ()) -> NoiseState:
        """One sample."""
        x = p.threat.project(p.images + p.threat.noise(step_keys(p, i), p.images), p.images)
        return NoiseState(s.found.seen(p, x, p.logits_fn(x)))
