"""Momentum iterative method (Dong et al., 2018): g+ = mu g + grad / mean|grad|, x+ = P(x + a sign(g+)).

The gradient is divided by its mean absolute value, so that early and late steps weigh alike; L2 takes g+ / |g+|.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rst_jax.attacks.attack import Found, Problem, ascent
from rst_jax.losses import cross_entropy
from rst_jax.threat import per_example


class MIMState(NamedTuple):
    """Of each example: where it is, and the gradients gathered up to there."""

    found: Found
    x: jax.Array
    momentum: jax.Array


@dataclasses.dataclass(frozen=True)
class MIM:
    """MIM on cross-entropy from the clean image (deterministic); success at any iterate counts.

    Attributes:
      step_size: in units of eps; None is 1 / steps, so that the steps together just reach the sphere.
      mu: what is kept of the gathered gradients.
    """

    steps: int = 10
    step_size: float | None = None
    mu: float = 1.0
    rounds = 1
    name = "MIM"
    targeted = False
    needs_gradient = True
    rests = True

    def _looked_at(self, p: Problem, x: jax.Array, s: MIMState) -> MIMState:
        _, logits, gradient = ascent(p, x, lambda z: cross_entropy(z, p.labels))
        mean = jnp.mean(jnp.abs(gradient), axis=tuple(range(1, x.ndim)))
        unit = gradient / per_example(jnp.where(mean == 0, 1, mean), x)
        return MIMState(s.found.seen(p, x, logits, gradient), x, self.mu * s.momentum + unit)

    def start(self, p: Problem) -> MIMState:
        """Begin at the clean image."""
        return self._looked_at(p, p.images, MIMState(Found.nothing(p), p.images, jnp.zeros_like(p.images)))

    def step(self, p: Problem, s: MIMState, i: jax.Array) -> MIMState:
        """One projected step along the gathered gradients."""
        size = (1 / self.steps if self.step_size is None else self.step_size) * p.threat.eps
        return self._looked_at(p, p.threat.ascend(s.x, s.momentum, size, p.images), s)
