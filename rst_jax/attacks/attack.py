"""What an attack is: a start and a step, over examples that know nothing of one another.

An attack holds its settings; everything else lies in the `Problem` and in a state whose every array has one row an
example. So a batch can be stopped, split over devices or made of other examples, and no example's result changes.

Each step looks at an image, then says where to look next; the network is in no other place.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import PyTree

from rst_jax import ranges
from rst_jax.losses import correct, margin
from rst_jax.threat import Array, ThreatModel, per_example, pixels

LogitsFn = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is attacked.

    Attributes:
      logits_fn: images [N, ...] to logits [N, classes].
      threat: norm, eps, box.
      images: [N, ...] in the box.
      logits: [N, classes] of the images.
      labels: int [N].
      targets: int [N], the class that a targeted attack aims at; -1 for the others.
      keys: random keys [N], one an example; on the host, the two words of each, uint32 [N, 2].
    """

    logits_fn: LogitsFn
    threat: ThreatModel
    images: Array
    logits: Array
    labels: Array
    targets: Array
    keys: Array


class Found(NamedTuple):
    """What an attack has found so far.

    Attributes:
      adversarial: [N, ...]: a misclassified image, or the clean one.
      broken: bool [N]: `adversarial` is misclassified and within the threat model, so the attack says.
      least: [N]: the smallest margin (`losses.margin`) of any image seen within the threat model.
      queries: int32 [N]: forward passes.
      gradients: int32 [N]: backward passes.
      flat: int32 [N]: gradients that were zero in every pixel.
    """

    adversarial: Array
    broken: Array
    least: Array
    queries: Array
    gradients: Array
    flat: Array

    @classmethod
    def clean(cls, p: Problem) -> "Found":
        """Before the first pass: only what is misclassified as it is."""
        none, now = np.zeros(p.labels.shape, np.int32), margin(p.logits, p.labels)
        return cls(p.images, ~correct(p.logits, p.labels), now, none, none, none)

    def seen(self, p: Problem, images: Array, logits: Array, gradient: Array | None = None) -> "Found":
        """After a pass over `images`, all within the threat model."""
        least = jnp.fmin(self.least, margin(logits, p.labels))  # what is not a number says nothing
        return self._replace(least=least).judged(p, images, logits, ~correct(logits, p.labels), gradient)

    def judged(self, p: Problem, images: Array, logits: Array, broken: Array, gradient: Array | None = None) -> "Found":
        """As `seen`, where the caller says which images count."""
        flat = jnp.zeros_like(broken)
        if gradient is not None:
            flat = abs(gradient).max(axis=pixels(gradient), initial=0) == 0
        return Found(
            jnp.where(per_example(broken, images), images, self.adversarial),
            self.broken | broken,
            self.least,
            self.queries + 1,
            self.gradients + int(gradient is not None),
            self.flat + flat.astype(jnp.int32),
        )


class Attack:
    """An attack's settings, and what it does with them; its class is a frozen dataclass."""

    steps: int
    """How many a round has."""
    rounds: int
    """How often it starts again: restarts, or targets."""

    def __post_init__(self) -> None:
        ranges.check(self)

    @property
    def name(self) -> str:
        """As in tables."""
        raise NotImplementedError

    @property
    def stream(self) -> str:
        """What its random samples follow from, with the key, the round and the example's id: attacks differ in it."""
        return self.name

    @property
    def passes(self) -> int:
        """How often `step` is called in a round: most attacks look once more, at where the last step ended."""
        return self.steps + 1

    @property
    def targeted(self) -> bool:
        """Whether round r aims at the class that ranks r + 2 in the clean logits."""
        return False

    def rounds_of(self, classes: int) -> int:
        """How many rounds there are where there are so many classes: every other class is a target once at most."""
        return min(self.rounds, classes - 1) if self.targeted else self.rounds

    @property
    def needs_gradient(self) -> bool:
        """Whether `logits_fn` must be differentiable."""
        return True

    @property
    def rests(self) -> bool:
        """Whether a broken example is left as it is; its result is the same however long the others take."""
        return True

    @property
    def near(self) -> float:
        """It is for examples whose margin was brought below so much of the clean one; their rounds run side by side."""
        return math.inf

    @property
    def program(self) -> "Attack":
        """Attacks that are the same program, given their problems, have the same."""
        return self

    def sample(self, p: Problem) -> tuple[PyTree, PyTree]:
        """Random samples on the host: arrays [N, ...] for the start, and for the steps [N, passes, ...].

        What would be more than some numbers a step is sampled in the step, from `step_keys`.
        """
        return (), ()

    def start(self, p: Problem, sampled: PyTree) -> PyTree:
        """The state before the first step, on the host: without a pass through the network."""
        raise NotImplementedError

    def step(self, p: Problem, s: PyTree, i: jax.Array, sampled: PyTree) -> PyTree:
        """The state after step i, counted from 0, with its part [N, ...] of what was sampled."""
        raise NotImplementedError


def advance(attack: Attack, p: Problem, state: PyTree, i: jax.Array, sampled: PyTree) -> PyTree:
    """One step, in which broken examples rest if the attack lets them; `sampled` is for all steps."""
    now = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, i, axis=1, keepdims=False), sampled)
    after = attack.step(p, state, i, now)
    if not attack.rests:
        return after
    done = state.found.broken

    def rest(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(per_example(done, old), old, new)

    return jax.tree.map(rest, state, after)


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


def step_keys(p: Problem, i: jax.Array | int) -> jax.Array:
    """A key an example for step i."""
    return jax.vmap(jax.random.fold_in, (0, None))(p.keys, i)


def uniform(keys: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Samples from [0, 1), float32 [N, *shape], each example's from its own key, uint32 [N, 2]."""
    return _samples(keys, shape, lambda rng: rng.random)


def normal(keys: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """As `uniform`, of the normal distribution."""
    return _samples(keys, shape, lambda rng: rng.standard_normal)


def _samples(keys: np.ndarray, shape: tuple[int, ...], kind: Callable[[np.random.Generator], Callable]) -> np.ndarray:
    """Of one generator, which for every example begins a stream of its own."""
    stream = np.random.Philox(key=0)
    fill, begin = kind(np.random.Generator(stream)), stream.state
    sampled = np.empty((len(keys), *shape), np.float32)
    for words, row in zip(keys, sampled, strict=True):
        begin["state"]["key"] = words.astype(np.uint64)
        stream.state = begin
        fill(dtype=np.float32, out=row)
    return sampled
