"""Auto-PGD (Croce and Hein, 2020): PGD with momentum that halves its step where the loss has stopped growing.

Linf: z = P(x + eta sign(g)), x+ = P(x + a (z - x) + (1 - a) (x - x_prev)); L2 takes g / |g|. At checkpoints the step of
an example is halved, and it goes back to its best point, if the loss grew in at most rho of the steps since the last
one, or if neither the step nor the best loss has changed since (their conditions 1 and 2).
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rst_jax.attacks.attack import Found, Problem, ascent
from rst_jax.losses import cross_entropy, dlr, margin, targeted_dlr
from rst_jax.threat import per_example

_KNEE = 10.0  # a margin from which cross-entropy is taken of colder logits; float32 loses the label's part at 17


def checkpoints(steps: int) -> list[int]:
    """After how many steps the step size is looked at: 22, 41, 57, 70, 80, 87, 93, 99 of 100."""
    gap, least, less = (max(int(part * steps), 1) for part in (0.22, 0.06, 0.03))
    found, at = [], gap
    while at <= steps:
        found.append(at)
        gap = max(gap - less, least)
        at += gap
    return found


class APGDState(NamedTuple):
    """Of each example: where it is and was, the gradient there, the best point, and the record of the losses."""

    found: Found
    x: jax.Array
    previous: jax.Array
    gradient: jax.Array
    best: jax.Array
    best_gradient: jax.Array
    best_loss: jax.Array
    loss: jax.Array
    increases: jax.Array
    checked_loss: jax.Array
    reduced: jax.Array
    size: jax.Array
    scale: jax.Array


@dataclasses.dataclass(frozen=True)
class APGD:
    """Auto-PGD on cross-entropy ("ce"), DLR ("dlr") or targeted DLR ("dlr-targeted").

    Attributes:
      loss: what is increased.
      rounds: restarts, or targets.
      rho: of the steps between two checkpoints, the share that must have increased the loss.
      faithful: as published: the record of losses leaves the first one out (0 stands in its place), cross-entropy is
        taken of the logits as they are, and a broken example goes on. Otherwise the logits of a clean image whose
        margin is above 10 are divided so that it is 10, where float32 still sees the label's part of the gradient.
    """

    loss: Literal["ce", "dlr", "dlr-targeted"] = "ce"
    steps: int = 100
    rounds: int = 1
    rho: float = 0.75
    faithful: bool = False
    needs_gradient = True

    @property
    def name(self) -> str:
        """As in tables."""
        return {"ce": "APGD-CE", "dlr": "APGD-DLR", "dlr-targeted": "APGD-T"}[self.loss]

    @property
    def targeted(self) -> bool:
        """Whether rounds are targets."""
        return self.loss == "dlr-targeted"

    @property
    def rests(self) -> bool:
        """Broken examples rest."""
        return not self.faithful

    def _enough(self) -> np.ndarray:
        """After each step: how many increases still halve the step size; -1 where there is no checkpoint."""
        enough, last = np.full(self.steps, -1, np.int32), 0
        for at in checkpoints(self.steps):
            enough[at - 1], last = int(self.rho * (at - last)), at
        return enough

    def _losses(self, p: Problem, logits: jax.Array, scale: jax.Array) -> jax.Array:
        if self.loss == "ce":
            return cross_entropy(logits if self.faithful else logits / scale[:, None], p.labels)
        return dlr(logits, p.labels) if self.loss == "dlr" else targeted_dlr(logits, p.labels, p.targets)

    def start(self, p: Problem, noise: jax.Array | None = None) -> APGDState:
        """Begin at a random point of the sphere; `noise` [N, ...] in place of the draw is scaled onto it."""
        if noise is None:
            draw = jax.random.normal if p.threat.norm == "l2" else _uniform
            noise = jax.vmap(lambda key: draw(key, p.images.shape[1:], p.images.dtype))(p.keys)
        x = p.threat.clip(p.images + p.threat.eps * p.threat.unit(noise))
        found, scale = Found.nothing(p), jnp.ones(p.labels.shape, p.images.dtype)
        if self.loss == "ce" and not self.faithful:
            clean = p.logits_fn(p.images)
            found, scale = found.seen(p, p.images, clean), jnp.maximum(margin(clean, p.labels) / _KNEE, scale)
        losses, logits, gradient = ascent(p, x, lambda z: self._losses(p, z, scale))
        return APGDState(
            found=found.seen(p, x, logits, gradient),
            x=x,
            previous=x,
            gradient=gradient,
            best=x,
            best_gradient=gradient,
            best_loss=losses,
            loss=jnp.zeros_like(losses) if self.faithful else losses,
            increases=jnp.zeros(p.labels.shape, jnp.int32),
            checked_loss=losses,
            reduced=jnp.ones(p.labels.shape, bool),
            size=jnp.full(p.labels.shape, 2 * p.threat.eps, p.images.dtype),
            scale=scale,
        )

    def step(self, p: Problem, s: APGDState, i: jax.Array) -> APGDState:
        """A step with momentum, then, at a checkpoint, a look at the step size."""
        momentum = jnp.where(i == 0, 1.0, 0.75).astype(s.x.dtype)
        z = p.threat.ascend(s.x, s.gradient, per_example(s.size, s.x), p.images)
        x = p.threat.project(s.x + (z - s.x) * momentum + (s.x - s.previous) * (1 - momentum), p.images)
        losses, logits, gradient = ascent(p, x, lambda z: self._losses(p, z, s.scale))
        better = losses > s.best_loss
        best_loss = jnp.where(better, losses, s.best_loss)
        best, best_gradient = (
            jnp.where(per_example(better, x), new, old) for new, old in ((x, s.best), (gradient, s.best_gradient))
        )
        increases = s.increases + (losses > s.loss).astype(jnp.int32)
        enough = jnp.asarray(self._enough())[i]
        check = enough >= 0
        stuck = ~s.reduced & (s.checked_loss >= best_loss)
        halve = check & ((increases <= enough) | stuck)
        back = per_example(halve, x)
        return APGDState(
            found=s.found.seen(p, x, logits, gradient),
            x=jnp.where(back, best, x),
            previous=s.x,
            gradient=jnp.where(back, best_gradient, gradient),
            best=best,
            best_gradient=best_gradient,
            best_loss=best_loss,
            loss=losses,
            increases=jnp.where(check, 0, increases),
            checked_loss=jnp.where(check, best_loss, s.checked_loss),
            reduced=jnp.where(check, halve, s.reduced),
            size=jnp.where(halve, s.size / 2, s.size),
            scale=s.scale,
        )


def _uniform(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    return jax.random.uniform(key, shape, dtype, -1, 1)
