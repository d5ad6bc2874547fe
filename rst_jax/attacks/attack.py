"""What an attack is: a start and a step, over examples that know nothing of one another.

An attack holds its settings; everything else lies in the `Problem` and in a state whose every array has one row an
example. So a batch can be stopped, split over devices or made of other examples, and no example's result changes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from rst_jax.losses import correct, margin
from rst_jax.threat import ThreatModel, per_example
from rst_jax.threat import flat as in_rows

LogitsFn = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is attacked.

    Attributes:
      logits_fn: images [N, ...] to logits [N, classes].
      threat: norm, eps, box.
      images: [N, ...] in the box.
      labels: int [N].
      targets: int [N], the class that a targeted attack aims at; others do not look at it.
      keys: random keys [N], one an example.
    """

    logits_fn: LogitsFn
    threat: ThreatModel
    images: jax.Array
    labels: jax.Array
    targets: jax.Array
    keys: jax.Array


class Found(NamedTuple):
    """What an attack has found so far.

    Attributes:
      adversarial: [N, ...]: a misclassified image, or the clean one.
      broken: bool [N]: `adversarial` is misclassified and within the threat model, so the attack says.
      margin: [N]: of `adversarial` (`losses.margin`).
      queries: int32 [N]: forward passes.
      gradients: int32 [N]: backward passes.
      flat: int32 [N]: gradients that were zero in every pixel.
    """

    adversarial: jax.Array
    broken: jax.Array
    margin: jax.Array
    queries: jax.Array
    gradients: jax.Array
    flat: jax.Array

    @classmethod
    def nothing(cls, p: Problem) -> "Found":
        """Before the first pass."""
        n = p.labels.shape[0]
        none = jnp.zeros(n, jnp.int32)
        return cls(p.images, jnp.zeros(n, bool), jnp.full(n, jnp.inf, p.images.dtype), none, none, none)

    def seen(self, p: Problem, images: jax.Array, logits: jax.Array, gradient: jax.Array | None = None) -> "Found":
        """After a pass over `images`, all within the threat model."""
        return self.judged(p, images, logits, ~correct(logits, p.labels), gradient)

    def judged(
        self, p: Problem, images: jax.Array, logits: jax.Array, broken: jax.Array, gradient: jax.Array | None = None
    ) -> "Found":
        """As `seen`, where the caller says which images count."""
        flat = jnp.zeros_like(broken)
        if gradient is not None:
            flat = jnp.max(jnp.abs(in_rows(gradient)), axis=-1, initial=0) == 0
        return Found(
            jnp.where(per_example(broken, images), images, self.adversarial),
            self.broken | broken,
            jnp.where(broken, margin(logits, p.labels), self.margin),
            self.queries + 1,
            self.gradients + int(gradient is not None),
            self.flat + flat.astype(jnp.int32),
        )


class State(Protocol):
    """What an attack carries from step to step: a tuple of arrays with one row an example, `found` among them."""

    @property
    def found(self) -> Found:
        """What it has found so far."""


class Attack(Protocol):
    """An attack's settings, and what it does with them."""

    @property
    def name(self) -> str:
        """As in tables."""

    @property
    def steps(self) -> int:
        """How many steps a round has."""

    @property
    def rounds(self) -> int:
        """How often it starts again: restarts, or targets."""

    @property
    def targeted(self) -> bool:
        """Whether round r aims at the class that ranks r + 2 in the clean logits."""

    @property
    def needs_gradient(self) -> bool:
        """Whether `logits_fn` must be differentiable."""

    @property
    def rests(self) -> bool:
        """Whether a broken example is left as it is; its result is the same however long the others take."""

    def start(self, p: Problem) -> Any:
        """The state before the first step."""

    def step(self, p: Problem, state: Any, i: jax.Array) -> Any:
        """The state after step i, counted from 0."""


def advance(attack: Attack, p: Problem, state: Any, i: jax.Array) -> Any:
    """One step, in which broken examples rest if the attack lets them."""
    after = attack.step(p, state, i)
    if not attack.rests:
        return after
    done = state.found.broken

    def rest(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(per_example(done, old), old, new)

    return jax.tree.map(rest, state, after)


def run(attack: Attack, p: Problem) -> Found:
    """One round of an attack as one program."""

    def body(state: Any, i: jax.Array) -> tuple[Any, None]:
        return advance(attack, p, state, i), None

    state, _ = lax.scan(body, attack.start(p), jnp.arange(attack.steps, dtype=jnp.int32))
    return state.found


def ascent(
    p: Problem, images: jax.Array, loss: Callable[[jax.Array], jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Losses [N], logits [N, classes] and the gradient with respect to `images`, of a loss of logits [N]."""

    def total(images: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        logits = p.logits_fn(images)
        losses = loss(logits)
        return jnp.sum(losses), (losses, logits)

    gradient, (losses, logits) = jax.grad(total, has_aux=True)(images)
    return losses, logits, gradient


def ranked(logits: jax.Array, rank: int) -> jax.Array:
    """The class of each example whose logit is the `rank`-th largest, counted from 1: int32 [N]."""
    return lax.top_k(logits, rank)[1][:, -1].astype(jnp.int32)


def step_keys(p: Problem, i: jax.Array) -> jax.Array:
    """A key an example for step i."""
    return jax.vmap(jax.random.fold_in, (0, None))(p.keys, i)
