"""Projected gradient descent (Madry et al., 2018), and its one-step relatives.

`pgd` is the loop that training runs through; `PGD` the attack of an evaluation, which looks at every iterate.

FGSM (Goodfellow et al., 2015) is one step of eps from the image itself; FGSM-RS (Wong et al., 2020) one step of
1.25 eps from a uniform start; PGD several smaller steps from a uniform start; CW-Linf (after Carlini and Wagner, 2017)
PGD on the margin.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import PyTree

from rst_jax.attacks.attack import Attack, Found, Problem, ascent, normal, uniform
from rst_jax.config import PGDSettings
from rst_jax.losses import correct, cross_entropy, margin
from rst_jax.threat import Array, ThreatModel, ball, per_example

Loss = Callable[[jax.Array, jax.Array], jax.Array]


def pgd(
    logits_fn: Callable,
    images: jax.Array,
    labels: jax.Array,
    threat: ThreatModel,
    settings: PGDSettings,
    *,
    start: jax.Array | None = None,
    loss: Loss = cross_entropy,
    rest_when_broken: bool = False,
    memory: PyTree = None,
    unroll: bool = False,
) -> PyTree:
    """Adversarial images for a classifier.

    Each step moves the images by its size along the steepest ascent of the loss and projects them into the
    threat model. Only the images are differentiated.

    Args:
      logits_fn: images [N, ...] to logits [N, classes]. With `memory`, (images, memory) to (logits, memory):
        the running statistics of a network that is attacked in training mode.
      images: [N, ...] in the threat model's box.
      labels: [N] integers.
      threat: norm, eps, box.
      settings: steps and their size; the start and the loss are the caller's.
      start: noise [N, ...] added (and projected) before the first step; see `ThreatModel.noise`.
      loss: (logits, labels) to [N], to be increased.
      rest_when_broken: an example stays where it is once it is misclassified.
      memory: a tree carried through the forward passes, or None.
      unroll: a flat program instead of a loop.

    Returns:
      The adversarial images; with `memory`, (adversarial images, memory).
    """
    stateful = memory is not None

    def objective(adversarial: jax.Array, memory: PyTree) -> tuple[jax.Array, PyTree]:
        logits, memory = logits_fn(adversarial, memory) if stateful else (logits_fn(adversarial), None)
        return jnp.sum(loss(logits, labels)), (correct(logits, labels), memory)

    def step(adversarial: jax.Array, memory: PyTree) -> tuple[jax.Array, PyTree]:
        gradient, (standing, memory) = jax.grad(objective, has_aux=True)(adversarial, memory)
        moved = threat.ascend(adversarial, gradient, settings.step_size, images)
        if rest_when_broken:
            moved = jnp.where(per_example(standing, images), moved, adversarial)
        return moved, memory

    adversarial = images if start is None else threat.project(images + start, images)
    if unroll:
        for _ in range(settings.steps):
            adversarial, memory = step(adversarial, memory)
    else:
        (adversarial, memory), _ = lax.scan(
            lambda carry, _: (step(*carry), None), (adversarial, memory), None, settings.steps
        )
    return (adversarial, memory) if stateful else adversarial


class PGDState(NamedTuple):
    """Of each example: where to look next."""

    found: Found
    x: Array


@dataclasses.dataclass(frozen=True)
class PGD(Attack):
    """PGD on cross-entropy or, as CW-Linf, on the margin; success at any iterate counts.

    Attributes:
      title: its name: "FGSM", or with what tells it from others, "PGD-20 eps/4".
      settings: steps and their size in image units, start, restarts, loss.
    """

    title: str
    settings: PGDSettings

    @property
    def name(self) -> str:
        """As in tables."""
        return self.title

    @property
    def stream(self) -> str:
        """The first word of the title: the others say what its settings are."""
        return self.title.split()[0]

    @property
    def steps(self) -> int:  # type: ignore[override]
        """How many a restart has."""
        return self.settings.steps

    @property
    def rounds(self) -> int:  # type: ignore[override]
        """The restarts."""
        return self.settings.restarts

    @property
    def program(self) -> "PGD":
        """Restarts share one."""
        return dataclasses.replace(self, settings=dataclasses.replace(self.settings, restarts=1))

    def sample(self, p: Problem) -> tuple[PyTree, PyTree]:
        """For a random start: uniform in the cube (Linf) or the ball (L2) of radius one, [N, ...]."""
        if not self.settings.random_start:
            return np.zeros_like(p.images), ()
        if p.threat.norm == "linf":
            return 2 * uniform(p.keys, p.images.shape[1:]) - 1, ()
        return ball(normal(p.keys, (p.images[0].size + 2,)), p.images), ()

    def start(self, p: Problem, sampled: np.ndarray) -> PGDState:
        """Begin at the image with that times eps."""
        return PGDState(Found.clean(p), p.threat.project(p.images + p.threat.eps * sampled, p.images))

    def step(self, p: Problem, s: PGDState, i: jax.Array, sampled: PyTree = ()) -> PGDState:
        """Look, and take a projected step."""

        def loss(logits: jax.Array) -> jax.Array:
            return cross_entropy(logits, p.labels) if self.settings.loss == "ce" else -margin(logits, p.labels)

        _, logits, gradient = ascent(p, s.x, loss)
        x = p.threat.ascend(s.x, gradient, self.settings.step_size, p.images)
        return PGDState(s.found.seen(p, s.x, logits, gradient), x)
