"""What attacks have found, example by example; in NumPy, apart from the programs that find it."""

import dataclasses

import numpy as np

from rst_jax.attacks.attack import Attack
from rst_jax.losses import correct, margin

STANDING, WRONG = -1, -2  # in place of an attack's number


@dataclasses.dataclass(frozen=True)
class Examples:
    """What a row is measured on: images float32 [n, H, W, C] in [0, 1], labels and ids int32 [n], clean logits."""

    images: np.ndarray
    labels: np.ndarray
    ids: np.ndarray
    logits: np.ndarray

    def first(self, n: int) -> "Examples":
        """The first n of them; all for 0."""
        return Examples(*(field[: n or None] for field in (self.images, self.labels, self.ids, self.logits)))

    @property
    def right(self) -> np.ndarray:
        """Which are classified right: bool [n]."""
        return correct(self.logits, self.labels)


@dataclasses.dataclass
class Evidence:
    """What a row has found, example by example; every array is [n].

    Attributes:
      attack: number of the attack that broke it; STANDING, or WRONG without any attack.
      round: of that attack. target: the class it aimed at, or -1.
      prediction: what the adversarial image is taken for.
      clean: margin of the clean image.
      margin: of the verified adversarial image (of the clean one if there is none).
      distance: how far it was moved, in the row's norm.
      least: the smallest margin of any image looked at within the ball (not of all attacks' images: see `Found`).
      closest: the distance of the closest adversarial image that a minimal-norm attack found, whatever eps; else inf.
      queries, gradients: passes spent on it. flat: gradients that were zero.
      adversarial: float32 [n, H, W, C], the clean image where there is none.
      unverified: claims that did not hold, of each attack. not_finite: images or logits that were not.
    """

    attack: np.ndarray
    round: np.ndarray
    target: np.ndarray
    prediction: np.ndarray
    clean: np.ndarray
    margin: np.ndarray
    distance: np.ndarray
    least: np.ndarray
    closest: np.ndarray
    queries: np.ndarray
    gradients: np.ndarray
    flat: np.ndarray
    adversarial: np.ndarray
    unverified: np.ndarray
    not_finite: np.ndarray

    @classmethod
    def none(cls, examples: Examples, attacks: int) -> "Evidence":
        """Before the first attack."""
        n = len(examples.labels)
        return cls(
            attack=np.where(examples.right, STANDING, WRONG).astype(np.int16),
            round=np.full(n, -1, np.int16),
            target=np.full(n, -1, np.int32),
            prediction=np.argmax(examples.logits, -1).astype(np.int32),
            clean=margin(examples.logits, examples.labels),
            margin=margin(examples.logits, examples.labels),
            distance=np.zeros(n, np.float32),
            least=margin(examples.logits, examples.labels),
            closest=np.full(n, np.inf, np.float32),
            queries=np.zeros(n, np.int32),
            gradients=np.zeros(n, np.int32),
            flat=np.zeros(n, np.int32),
            adversarial=examples.images.copy(),
            unverified=np.zeros(attacks, np.int32),
            not_finite=np.zeros(attacks, np.int32),
        )

    @property
    def standing(self) -> np.ndarray:
        """Which examples no attack has broken: bool [n]."""
        return self.attack == STANDING

    def pending(self, attack: Attack) -> np.ndarray:
        """Whom an attack would meet now: their numbers, in order."""
        if attack.near == np.inf:  # also those whose clean margin is 0
            return np.flatnonzero(self.standing)
        return np.flatnonzero(self.standing & (self.least <= attack.near * self.clean))

    def enter(self, number: int, rounds: np.ndarray, index: np.ndarray, done: dict[str, np.ndarray]) -> None:
        """What a batch has found: rounds of attack `number` on examples `index`; the first that broke one counts."""
        for name in ("queries", "gradients", "flat"):
            np.add.at(getattr(self, name), index, done[name])
        for name in ("least", "closest"):
            np.fmin.at(getattr(self, name), index, done[name])
        held = np.flatnonzero(done["held"])
        broken, first = np.unique(index[held], return_index=True)
        new = self.standing[broken]
        broken, first = broken[new], first[new]
        for name in ("target", "prediction", "margin", "distance"):
            getattr(self, name)[broken] = done[name][held[first]]
        self.attack[broken], self.round[broken] = number, rounds[held[first]]
        self.adversarial[broken] = done["adversarial"][first]
        self.unverified[number] += done["unverified"]
        self.not_finite[number] += done["not_finite"]
