"""Fast Adaptive Boundary attack (Croce and Hein, 2020): the closest point beyond a linearised decision boundary.

Each step linearises z_t - z_y, projects the current and the clean image onto that hyperplane within the box, moves
between the two (overshooting by eta), and steps back towards the clean image by beta whenever it finds an adversarial.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import PyTree

from rst_jax.attacks.attack import Attack, Found, Problem, ascent
from rst_jax.losses import at, correct
from rst_jax.ranges import Positive, Rate, Share
from rst_jax.threat import Array, ThreatModel, l2_norm, per_example, pixels

_SETTLED = 64  # Newton steps at most; a handful is usual


class FABState(NamedTuple):
    """Of each example: where it is, and how far its closest adversarial image is."""

    found: Found
    x: Array
    closest: Array


@dataclasses.dataclass(frozen=True)
class FAB(Attack):
    """FAB from the clean image (deterministic), targeted (FAB-T) or against the class whose boundary is nearest.

    Attributes:
      rounds: targets of FAB-T; 1 otherwise.
      eta: overshoot.
      beta: how much of the way out is kept after an adversarial image.
      alpha_max: at most so much of the projection of the clean image.
      minimal: go on for the closest adversarial image after one within eps is found.
    """

    targeted: bool = True
    steps: Positive = 100
    rounds: Positive = 9
    eta: Rate = 1.05
    beta: Share = 0.9
    alpha_max: Share = 0.1
    minimal: bool = False

    @property
    def name(self) -> str:
        """As in tables."""
        return "FAB-T" if self.targeted else "FAB"

    @property
    def rests(self) -> bool:
        """Broken examples rest, unless the closest image is wanted."""
        return not self.minimal

    @property
    def passes(self) -> int:
        """The steps; each looks at where it stands and at where it goes."""
        return self.steps

    def start(self, p: Problem, sampled: PyTree = ()) -> FABState:
        """Begin at the clean image."""
        found = Found.clean(p)
        return FABState(found, p.images, np.where(found.broken, 0, np.inf).astype(p.images.dtype))

    def step(self, p: Problem, s: FABState, i: jax.Array, sampled: PyTree = ()) -> FABState:
        """Linearise, project, mix, look, step back."""
        difference, gradient = self._boundary(p, s.x)
        offset = jnp.sum(gradient * s.x, axis=pixels(s.x)) - difference
        from_here, from_clean = (to_hyperplane(p.threat, x, gradient, offset) for x in (s.x, p.images))
        far, near = (jnp.maximum(p.threat.length(d), 1e-8) for d in (from_here, from_clean))
        alpha = per_example(jnp.minimum(far / (far + near), self.alpha_max), s.x)
        x = p.threat.clip((s.x + self.eta * from_here) * (1 - alpha) + (p.images + self.eta * from_clean) * alpha)
        logits = p.logits_fn(x)
        adversarial = ~correct(logits, p.labels)
        distance = p.threat.distance(x, p.images)
        closer = adversarial & (distance < s.closest)
        found = s.found.judged(p, x, logits, closer & (distance <= p.threat.eps), gradient)
        others = 0 if self.targeted else logits.shape[-1] - 1  # backward passes besides the one that `judged` counts
        return FABState(
            found._replace(
                queries=found.queries + 1,
                gradients=found.gradients + others,
                flat=found.flat + others * (found.flat - s.found.flat),
            ),
            jnp.where(per_example(adversarial, x), p.images + self.beta * (x - p.images), x),
            jnp.where(closer, distance, s.closest),
        )

    def _boundary(self, p: Problem, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """z_t - z_y at x, [N], and its gradient; t is the target, or the class whose boundary is nearest."""
        if self.targeted:
            difference, _, gradient = ascent(p, x, lambda z: at(z, p.targets) - at(z, p.labels))
            return difference, gradient
        logits, pull_back = jax.vjp(p.logits_fn, x)
        classes = logits.shape[-1]
        units, mine = jnp.eye(classes, dtype=logits.dtype), jax.nn.one_hot(p.labels, classes, dtype=logits.dtype)
        gradients = lax.map(lambda unit: pull_back(unit - mine)[0], units)  # [classes, N, ...]
        logits = logits - at(logits, p.labels)[:, None]
        lengths = jax.vmap(lambda g: _dual_length(p.threat, g))(gradients).T
        own = jax.nn.one_hot(p.labels, classes, dtype=bool)
        nearest = jnp.argmin(jnp.where(own, jnp.inf, jnp.abs(logits) / (lengths + 1e-12)), axis=-1)
        gradient = jnp.take_along_axis(gradients, nearest.reshape(1, -1, *(1,) * (x.ndim - 1)), axis=0)[0]
        return at(logits, nearest), gradient


def to_hyperplane(threat: ThreatModel, x: Array, normal: Array, offset: Array) -> jax.Array:
    """The smallest move, in the threat model's norm, that brings x onto <normal, x> = offset within the box.

    Every pixel goes the way that helps, by a common length (Linf) or in proportion to |normal| (L2), until it meets
    the box: <|normal|, move> is concave and piecewise linear in that length, so Newton's method from 0 ends at the
    exact solution after finitely many steps, without a sort. Where the box is too small, every pixel goes to its edge.

    Args:
      threat: norm and box.
      x: [N, ...] in the box; normal: [N, ...]; offset: [N].

    Returns:
      The moves [N, ...].
    """
    axes = pixels(x)
    excess = jnp.sum(normal * x, axis=axes) - offset
    way = -jnp.sign(normal) * per_example(jnp.where(excess >= 0, 1, -1).astype(x.dtype), x)
    room = jnp.where(way < 0, x - threat.lower, threat.upper - x)
    weight, wanted = jnp.abs(normal), jnp.abs(excess)
    pace = weight if threat.norm == "l2" else jnp.ones_like(weight)

    def moves(length: jax.Array) -> jax.Array:
        return jnp.minimum(per_example(length, x) * pace, room)

    def newton(carry: tuple) -> tuple:
        length, slope_before, settled, count = carry
        free = per_example(length, x) * pace < room
        slope = jnp.sum(jnp.where(free, weight * pace, 0), axis=axes)
        missing = wanted - jnp.sum(weight * moves(length), axis=axes)
        after = jnp.where(slope > 0, length + missing / jnp.where(slope > 0, slope, 1), jnp.inf)
        settled = settled | (slope == slope_before)  # the same pixels are free: the last step was exact
        return jnp.where(settled, length, after), slope, settled | ~(slope > 0), count + 1

    n = jnp.zeros_like(wanted)
    start = (n, n - 1, jnp.zeros(n.shape, bool), jnp.int32(0))
    length, *_ = lax.while_loop(lambda c: ~jnp.all(c[2]) & (c[3] < _SETTLED), newton, start)
    full = jnp.isinf(length)
    return way * jnp.where(per_example(full, x), room, moves(jnp.where(full, 0, length)))


def _dual_length(threat: ThreatModel, gradient: jax.Array) -> jax.Array:
    return jnp.sum(abs(gradient), axis=pixels(gradient)) if threat.norm == "linf" else l2_norm(gradient)
