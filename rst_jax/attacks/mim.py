"""Momentum iterative method (Dong et al., 2018): g+ = mu g + grad / mean|grad|, x+ = P(x + a sign(g+)).

The gradient is divided by its mean absolute value, so that early and late steps weigh alike; L2 takes g+ / |g+|.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from rst_jax.attacks.attack import Attack, Found, Problem, ascent
from rst_jax.losses import cross_entropy
from rst_jax.ranges import Length, Positive, Rate
from rst_jax.threat import Array, per_example, pixels


class MIMState(NamedTuple):
    """Of each example: where to look next, and the gradients gathered so far."""

    found: Found
    x: Array
    momentum: Array


@dataclasses.dataclass(frozen=True)
class MIM(Attack):
    """MIM on cross-entropy from the clean image (deterministic); success at any iterate counts.

    Attributes:
      step_size: in image units; None is eps / steps, so that the steps together just reach the sphere.
      mu: what is kept of the gathered gradients.
    """

    steps: Positive = 10
    step_size: Length | None = None
    mu: Rate = 1.0
    rounds = 1
    name = "MIM"

    def start(self, p: Problem, sampled: PyTree = ()) -> MIMState:
        """Begin at the clean image."""
        return MIMState(Found.clean(p), p.images, np.zeros_like(p.images))

    def step(self, p: Problem, s: MIMState, i: jax.Array, sampled: PyTree = ()) -> MIMState:
        """Look, gather the gradient, and take a projected step along what is gathered."""
        _, logits, gradient = ascent(p, s.x, lambda z: cross_entropy(z, p.labels))
        mean = jnp.mean(abs(gradient), axis=pixels(gradient))
        momentum = self.mu * s.momentum + gradient / per_example(jnp.where(mean == 0, 1, mean), s.x)
        size = 1 / self.steps * p.threat.eps if self.step_size is None else self.step_size
        found = s.found.seen(p, s.x, logits, gradient)
        return MIMState(found, p.threat.ascend(s.x, momentum, size, p.images), momentum)
