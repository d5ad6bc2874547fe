"""Bandits with time and data priors (Ilyas, Engstrom and Madry, 2019): needs logits only.

A prior v over tiles stands for the gradient of the loss and lives on from step to step. With noise u, N(0, 1 / tiles):

  estimate = u [L(x + h unit(v + d u)) - L(x + h unit(v - d u))] / h,

where unit(.) is over its L2 norm, spread over the pixels. L2: v+ = v + r estimate. Linf, exponentiated gradients:
v+ = tanh(artanh(v) + r estimate). The image then takes a projected step along v+.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from rst_jax.attacks.attack import Attack, Found, Problem, step_keys
from rst_jax.losses import cross_entropy
from rst_jax.ranges import Length, Positive, Rate
from rst_jax.threat import Array, l2_norm, per_example


class BanditsState(NamedTuple):
    """Of each example: where it is, and the prior [N, rows, columns, C], under Linf its artanh."""

    found: Found
    x: Array
    prior: Array


@dataclasses.dataclass(frozen=True)
class Bandits(Attack):
    """Bandits-TD on cross-entropy; a step costs three queries: two for the estimate and one to look at the image.

    The authors give settings for ImageNet only. Ours are theirs, but for tiles of 4 pixels, which are about as large
    as theirs (50 by 50 of them in 224 by 224 pixels); steps of the image of 0.1 eps, as theirs are under L2 (Linf:
    0.2); and a probe of 0.1 under L2 too (theirs: 0.01), which leaves more digits of a float32 loss. The looks, which
    the authors do not count, are counted here, so that 3333 steps are 9,999 of their 10,000 queries.

    Attributes:
      step_size: of the image, in image units; None is a tenth of eps.
      tile: side of the pixels that share a value of the prior.
      probe: h, how far from the image the loss is asked for (L2 norm).
      exploration: d; None is 1 under Linf and 0.01 under L2.
      rate: r; None is 100 under Linf and 0.1 under L2.
    """

    steps: Positive = 3333
    rounds: Positive = 1
    step_size: Length | None = None
    tile: Positive = 4
    probe: Length = 0.1
    exploration: Length | None = None
    rate: Rate | None = None
    name = "Bandits"
    needs_gradient = False

    @property
    def passes(self) -> int:
        """The steps."""
        return self.steps

    def start(self, p: Problem, sampled: PyTree = ()) -> BanditsState:
        """Begin at the clean image, with a prior of zero."""
        n, h, w, c = p.images.shape
        prior = np.zeros((n, -(-h // self.tile), -(-w // self.tile), c), p.images.dtype)
        return BanditsState(Found.clean(p), p.images, prior)

    def step(self, p: Problem, s: BanditsState, i: jax.Array, sampled: PyTree = ()) -> BanditsState:
        """Estimate, update the prior, move, look."""
        rough = p.threat.norm == "linf"
        exploration = (1.0 if rough else 0.01) if self.exploration is None else self.exploration
        rate = (100.0 if rough else 0.1) if self.rate is None else self.rate
        shape, dtype = s.prior.shape[1:], s.prior.dtype
        noise = jax.vmap(lambda key: jax.random.normal(key, shape, dtype))(step_keys(p, i)) / s.prior[0].size ** 0.5
        prior = jnp.tanh(s.prior) if rough else s.prior

        def loss(prior: jax.Array) -> jax.Array:
            way = self._spread(prior, p.images)
            way = way / (per_example(l2_norm(way), way) + 1e-12)
            return cross_entropy(p.logits_fn(s.x + self.probe * way), p.labels)

        rise = (loss(prior + exploration * noise) - loss(prior - exploration * noise)) / self.probe
        after = s.prior + rate * per_example(rise, noise) * noise
        way = self._spread(jnp.tanh(after) if rough else after, p.images)
        x = p.threat.ascend(s.x, way, 0.1 * p.threat.eps if self.step_size is None else self.step_size, p.images)
        found = s.found.seen(p, x, p.logits_fn(x))
        return BanditsState(found._replace(queries=found.queries + 2), x, after)

    def _spread(self, prior: Array, images: Array) -> jax.Array:
        """Every pixel takes the value of its tile (nearest): [N, H, W, C]."""
        rows, columns = (jnp.arange(n, dtype=jnp.int32) // self.tile for n in images.shape[1:3])
        return prior[:, rows][:, :, columns]
