"""Auto-PGD (Croce and Hein, 2020): PGD with momentum that halves its step where the loss has stopped growing.

Linf: z = P(x + eta sign(g)), x+ = P(x + a (z - x) + (1 - a) (x - x_prev)); L2 takes g / |g|. At checkpoints the step of
an example is halved, and it goes back to its best point, if the loss grew in at most rho of the steps since the last
one, or if neither the step nor the best loss has changed since (their conditions 1 and 2).
"""

import dataclasses
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from rst_jax.attacks.attack import Attack, Found, Problem, ascent, normal, uniform
from rst_jax.losses import cross_entropy, dlr, margin, targeted_dlr
from rst_jax.ranges import Positive, Share
from rst_jax.threat import Array, per_example

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
    """Of each example: where to look next, where it comes from, the best point, and the record of the losses."""

    found: Found
    x: Array
    previous: Array
    best: Array
    best_gradient: Array
    best_loss: Array
    loss: Array
    increases: Array
    checked_loss: Array
    reduced: Array
    size: Array


@dataclasses.dataclass(frozen=True)
class APGD(Attack):
    """Auto-PGD on cross-entropy ("ce"), DLR ("dlr") or targeted DLR ("dlr-targeted").

    "by target" is one program for two: targeted DLR for an example that has a target, cross-entropy for one without.

    Attributes:
      loss: what is increased.
      rounds: restarts, or targets.
      near: only for examples whose margin was brought below so much of the clean one, all restarts side by side.
      rho: of the steps between two checkpoints, the share that must have increased the loss.
      faithful: as published: the record of losses leaves the first one out (0 stands in its place), cross-entropy is
        taken of the logits as they are, and a broken example goes on. Otherwise the logits of a clean image whose
        margin is above 10 are divided so that it is 10, where float32 still sees the label's part of the gradient.
    """

    loss: Literal["ce", "dlr", "dlr-targeted", "by target"] = "ce"
    steps: Positive = 100
    rounds: Positive = 1
    near: float = math.inf
    rho: Share = 0.75
    faithful: bool = False

    @property
    def name(self) -> str:
        """As in tables."""
        known = {"ce": "APGD-CE", "dlr": "APGD-DLR", "dlr-targeted": "APGD-T", "by target": "APGD"}
        return known[self.loss] + ("" if self.near == math.inf else " near")

    @property
    def targeted(self) -> bool:
        """Whether rounds are targets."""
        return self.loss == "dlr-targeted"

    @property
    def rests(self) -> bool:
        """Broken examples rest."""
        return not self.faithful

    def _enough(self) -> np.ndarray:
        """At each look: how many increases still halve the step size; -1 where there is no checkpoint."""
        enough, last = np.full(self.passes, -1, np.int32), 0
        for at in checkpoints(self.steps):
            enough[at], last = int(self.rho * (at - last)), at
        return enough

    @property
    def program(self) -> "APGD":
        """One for cross-entropy and targets, however many runs."""
        return dataclasses.replace(self, rounds=1, near=math.inf, loss="dlr" if self.loss == "dlr" else "by target")

    def _losses(self, p: Problem, logits: jax.Array) -> jax.Array:
        if self.loss == "dlr":
            return dlr(logits, p.labels)
        if self.loss == "dlr-targeted":
            return targeted_dlr(logits, p.labels, p.targets)
        heat = jnp.maximum(margin(p.logits, p.labels) / _KNEE, 1)[:, None]
        losses = cross_entropy(logits if self.faithful else logits / heat, p.labels)
        if self.loss == "ce":
            return losses
        return jnp.where(p.targets < 0, losses, targeted_dlr(logits, p.labels, p.targets))

    def sample(self, p: Problem) -> tuple[np.ndarray, tuple[()]]:
        """A way to start off, of any length: uniform in the cube (Linf) or normal (L2), [N, ...]."""
        shape = p.images.shape[1:]
        return 2 * uniform(p.keys, shape) - 1 if p.threat.norm == "linf" else normal(p.keys, shape), ()

    def start(self, p: Problem, sampled: np.ndarray) -> APGDState:
        """Begin on the sphere, where that way leads."""
        x = p.threat.clip(p.images + p.threat.eps * p.threat.unit(sampled))
        zeros = np.zeros(p.labels.shape, x.dtype)
        return APGDState(
            found=Found.clean(p),
            x=x,
            previous=x,
            best=x,
            best_gradient=x,
            best_loss=zeros - np.inf,
            loss=zeros,
            increases=np.zeros(p.labels.shape, np.int32),
            checked_loss=zeros,
            reduced=np.ones(p.labels.shape, bool),
            size=zeros + 2 * p.threat.eps,
        )

    def step(self, p: Problem, s: APGDState, i: jax.Array, sampled: PyTree = ()) -> APGDState:
        """Look; at a checkpoint, judge the step size; take a step with momentum."""
        losses, logits, gradient = ascent(p, s.x, lambda z: self._losses(p, z))
        better = losses > s.best_loss
        best_loss = jnp.where(better, losses, s.best_loss)
        best, best_gradient = (
            jnp.where(per_example(better, s.x), new, old) for new, old in ((s.x, s.best), (gradient, s.best_gradient))
        )
        first = i == 0
        increases = s.increases + (~first & (losses > s.loss)).astype(jnp.int32)
        enough = jnp.asarray(self._enough())[i]
        check = enough >= 0
        stuck = ~s.reduced & (s.checked_loss >= best_loss)
        halve = check & ((increases <= enough) | stuck)
        back = per_example(halve, s.x)
        size = jnp.where(halve, s.size / 2, s.size)
        x, gradient = jnp.where(back, best, s.x), jnp.where(back, best_gradient, gradient)
        momentum = jnp.where(first, 1.0, 0.75).astype(x.dtype)
        z = p.threat.ascend(x, gradient, per_example(size, x), p.images)
        return APGDState(
            found=s.found.seen(p, s.x, logits, gradient),
            x=p.threat.project(x + (z - x) * momentum + (x - s.previous) * (1 - momentum), p.images),
            previous=x,
            best=best,
            best_gradient=best_gradient,
            best_loss=best_loss,
            loss=jnp.where(first & self.faithful, 0, losses),
            increases=jnp.where(check, 0, increases),
            checked_loss=jnp.where(check | first, best_loss, s.checked_loss),
            reduced=jnp.where(check, halve, s.reduced),
            size=size,
        )
