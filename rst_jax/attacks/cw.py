"""L2 attack of Carlini and Wagner (2017): the closest misclassified image, by Adam and a binary search.

With x' = (tanh(w) + 1) / 2, stretched to the box, Adam minimises |x' - x|^2 + c max(z_y - max_{i != y} z_i, 0) over w.
Every search step begins again at the clean image, with its own c for every example: halfway down to the largest that
failed after a success; after a failure ten times as large, or halfway up to the smallest that succeeded.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from rst_jax.attacks.attack import Attack, Found, Problem, ascent
from rst_jax.losses import correct, margin
from rst_jax.ranges import Positive, Rate
from rst_jax.threat import Array, ThreatModel, l2_norm, per_example

_INSIDE = 0.999999  # the clean image is pulled in by so much, since the edge of the box is at infinity
_DECAY = (0.9, 0.999)  # Adam's


class CWState(NamedTuple):
    """Of each example: its closest misclassified image, Adam's place and moments, and the search over c.

    `image` and its L2 distance `closest` know of no eps: the clean image and inf where nothing is found.
    """

    found: Found
    image: Array
    closest: Array
    w: Array
    first: Array
    second: Array
    c: Array
    low: Array
    high: Array
    reached: Array


@dataclasses.dataclass(frozen=True)
class CWL2(Attack):
    """Carlini-Wagner L2 with confidence 0 and without early abort (deterministic).

    Whatever the threat model's norm, the closest image in L2 is sought; it counts as found if it is also within the
    threat model. Gradients are counted of the margin, whether or not the loss has a part of it.

    Attributes:
      iterations: of Adam, in every search step.
      searches: values of c.
      rate: Adam's step size, in tanh space.
      c: the first.
    """

    iterations: Positive = 1000
    searches: Positive = 9
    rate: Rate = 0.01
    c: Rate = 1e-3
    rounds = 1
    name = "CW-L2"
    rests = False

    @property
    def passes(self) -> int:
        """Iterations of all searches."""
        return self.iterations * self.searches

    def start(self, p: Problem, sampled: PyTree = ()) -> CWState:
        """Begin at the clean image; where that is misclassified, nothing is closer."""
        found = Found.clean(p)
        zeros, n = np.zeros_like(p.images), np.zeros(p.labels.shape, p.images.dtype)
        return CWState(
            found=found,
            image=p.images,
            closest=np.where(found.broken, n, n + np.inf),
            w=zeros,
            first=zeros,
            second=zeros,
            c=np.full_like(n, self.c),
            low=n,
            high=np.full_like(n, np.inf),
            reached=np.zeros(n.shape, bool),
        )

    def step(self, p: Problem, s: CWState, i: jax.Array, sampled: PyTree = ()) -> CWState:
        """Look at the image at w, then move w; first, where a search step begins, choose c and go back."""
        s = self._searched(p, s, i)
        x = _image(p.threat, s.w)
        _, logits, gradient = ascent(p, x, lambda z: margin(z, p.labels))
        standing = correct(logits, p.labels)
        distance = l2_norm(x - p.images)
        closer = ~standing & (distance < s.closest)
        allowed = closer & (p.threat.distance(x, p.images) <= p.threat.eps)
        pull = 2 * (x - p.images) + per_example(jnp.where(standing, s.c, 0), x) * gradient
        slope = pull * (1 - jnp.square(jnp.tanh(s.w))) * (0.5 * (p.threat.upper - p.threat.lower))
        first, second = (
            decay * old + (1 - decay) * new
            for decay, old, new in zip(_DECAY, (s.first, s.second), (slope, jnp.square(slope)), strict=True)
        )
        count = (i % self.iterations + 1).astype(x.dtype)
        mean, square = (m / (1 - decay**count) for decay, m in zip(_DECAY, (first, second), strict=True))
        return s._replace(
            found=s.found.judged(p, x, logits, allowed, gradient),
            image=jnp.where(per_example(closer, x), x, s.image),
            closest=jnp.where(closer, distance, s.closest),
            w=s.w - self.rate * mean / (jnp.sqrt(square) + 1e-8),
            first=first,
            second=second,
            reached=s.reached | ~standing,
        )

    def _searched(self, p: Problem, s: CWState, i: jax.Array) -> CWState:
        """At the first iteration of a search step: c by the step before, Adam as new; otherwise as it is."""
        fresh = i % self.iterations == 0
        over = fresh & (i > 0)
        high = jnp.where(over & s.reached, s.c, s.high)
        low = jnp.where(over & ~s.reached, s.c, s.low)
        c = jnp.where(jnp.isinf(high), 10 * s.c, (low + high) / 2)
        return s._replace(
            w=jnp.where(fresh, _place(p.threat, p.images), s.w),
            first=jnp.where(fresh, 0, s.first),
            second=jnp.where(fresh, 0, s.second),
            c=jnp.where(over, c, s.c),
            low=low,
            high=high,
            reached=s.reached & ~fresh,
        )


def _place(threat: ThreatModel, images: Array) -> jax.Array:
    """The w of images in the box."""
    middle, half = (threat.upper + threat.lower) / 2, (threat.upper - threat.lower) / 2
    return jnp.arctanh((images - middle) / half * _INSIDE)


def _image(threat: ThreatModel, w: jax.Array) -> jax.Array:
    middle, half = (threat.upper + threat.lower) / 2, (threat.upper - threat.lower) / 2
    return threat.clip(middle + half * jnp.tanh(w))
