"""What is attacked, and what attacks have found, example by example; in NumPy, apart from the programs that find it."""

import dataclasses
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np

from rst_jax.attacks.attack import Attack
from rst_jax.losses import correct, margin
from rst_jax.runtime.files import among

STANDING, WRONG = -1, -2  # in place of an attack's number
SHOWN = 10  # adversarial images of a cascade that are always kept, to be looked at


@runtime_checkable
class Images(Protocol):
    """Images that no memory needs to hold: an array, or whatever reads those that it is asked for."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, index: np.ndarray, /) -> np.ndarray:
        """Those at the places `index`, int [n]: float32 [n, H, W, C]."""


@dataclasses.dataclass(frozen=True)
class Examples:
    """What a cascade is measured on.

    Attributes:
      images: float32 [n, H, W, C] in the threat model's box; they are read batch by batch.
      labels, ids: int32 [n].
      logits: of the clean images, [n, classes].
      digest: of images, labels and ids.
    """

    images: Images
    labels: np.ndarray
    ids: np.ndarray
    logits: np.ndarray
    digest: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, n: int) -> "Examples":
        """The first n of them (their images stay where they are); all for 0."""
        if not n or n >= len(self):
            return self
        return Examples(self.images, self.labels[:n], self.ids[:n], self.logits[:n])

    def read(self, index: np.ndarray) -> np.ndarray:
        """The images at the places `index`, float32 [k, H, W, C]; of several equal places, one is read."""
        places, back = np.unique(index, return_inverse=True)
        images = np.asarray(self.images[places])
        return images if len(places) == len(index) and (back[1:] > back[:-1]).all() else images[back]

    @cached_property
    def image_shape(self) -> tuple[int, ...]:
        """[H, W, C]."""
        return self.read(np.arange(1)).shape[1:]

    @property
    def right(self) -> np.ndarray:
        """Which are classified right: bool [n]."""
        return correct(self.logits, self.labels)


@dataclasses.dataclass
class Evidence:
    """What a cascade has found, example by example.

    The adversarial images are those of the first examples that were broken, `SHOWN` of them unless all were asked for;
    of the others, whoever keeps them takes them from `enter`. So what a cascade holds does not grow with its images.

    Attributes:
      attack: number of the attack that broke it; STANDING, or WRONG without any attack. [n], as what follows.
      round: of that attack. target: the class it aimed at, or -1.
      prediction: what the adversarial image is taken for.
      clean: margin of the clean image.
      margin: of the verified adversarial image (of the clean one if there is none).
      distance: how far it was moved, in the cascade's norm.
      least: the smallest margin of any image looked at within the ball (not of all attacks' images: see `Found`).
      closest: the distance of the closest adversarial image that a minimal-norm attack found, whatever eps; else inf.
      queries, gradients: passes spent on it. flat: gradients that were zero.
      kept: in ascending order, the examples whose adversarial images are held here, [k].
      adversarial: these, float32 [k, H, W, C].
      failed: some attack of it ended in an image that is not finite, has no finite logits, or left ball or box. What it
        would have found is not known, so such an example is never called robust.
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
    kept: np.ndarray
    adversarial: np.ndarray
    failed: np.ndarray
    unverified: np.ndarray
    not_finite: np.ndarray

    @classmethod
    def none(cls, examples: Examples, attacks: int) -> "Evidence":
        """Before the first attack."""
        n = len(examples)
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
            kept=np.zeros(0, np.int64),
            adversarial=np.zeros((0, *examples.image_shape), np.float32),
            failed=np.zeros(n, bool),
            unverified=np.zeros(attacks, np.int32),
            not_finite=np.zeros(attacks, np.int32),
        )

    @classmethod
    def of_arrays(cls, arrays: dict[str, np.ndarray], like: "Evidence") -> "Evidence | None":
        """What `vars` of another gave; None where it is not of as many examples and attacks as `like`.

        A file of version 0.3 holds an adversarial image of every example, and no failures.
        """
        arrays = {"failed": np.zeros_like(like.failed), **arrays}
        if "kept" not in arrays and arrays.keys() >= {"attack", "adversarial"}:
            kept = np.flatnonzero(arrays["attack"] >= 0)[:SHOWN]
            kept = kept[kept < len(arrays["adversarial"])]
            arrays |= {"kept": kept, "adversarial": arrays["adversarial"][kept]}
        free = ("kept", "adversarial")

        def of(held: dict[str, np.ndarray]) -> dict[str, tuple]:
            return {name: (a.ndim, a.shape[name in free :], a.dtype) for name, a in held.items()}

        if of(arrays) != of(vars(like)):
            return None
        places = among(arrays["kept"], len(like.attack)) and len(arrays["kept"]) == len(arrays["adversarial"])
        return cls(**arrays) if places and among(arrays["attack"] - WRONG, len(like.unverified) - WRONG) else None

    @property
    def standing(self) -> np.ndarray:
        """Which examples no attack has broken: bool [n]."""
        return self.attack == STANDING

    @property
    def robust(self) -> np.ndarray:
        """Which examples no attack has broken, though every one could be run: bool [n]."""
        return self.standing & ~self.failed

    def pending(self, attack: Attack) -> np.ndarray:
        """Whom an attack would meet now: their numbers, in order."""
        if attack.near == np.inf:  # also those whose clean margin is 0
            return np.flatnonzero(self.standing)
        return np.flatnonzero(self.standing & (self.least <= attack.near * self.clean))

    def enter(
        self, number: int, rounds: np.ndarray, index: np.ndarray, done: dict[str, np.ndarray], most: int | None = SHOWN
    ) -> tuple[np.ndarray, np.ndarray]:
        """What a batch has found: rounds of attack `number` on examples `index`; the first that broke one counts.

        Args:
          number, rounds, index, done: the batch, and what it found.
          most: adversarial images that are held; None: all.

        Returns:
          The examples that are newly broken, [k], and their adversarial images.
        """
        for name in ("queries", "gradients", "flat"):
            np.add.at(getattr(self, name), index, done[name])
        for name in ("least", "closest"):
            np.fmin.at(getattr(self, name), index, done[name])
        failed = done.get("failed", np.zeros(len(index), bool))  # batches of version 0.3 do not tell
        self.failed[index[failed]] = True  # an example may be there in several rounds
        held = np.flatnonzero(done["held"])
        broken, first = np.unique(index[held], return_index=True)
        new = self.standing[broken]
        broken, first = broken[new], first[new]
        for name in ("target", "prediction", "margin", "distance"):
            getattr(self, name)[broken] = done[name][held[first]]
        self.attack[broken], self.round[broken] = number, rounds[held[first]]
        self.unverified[number] += done["unverified"]
        self.not_finite[number] += done["not_finite"]
        images = done["adversarial"][first]
        kept = np.concatenate([self.kept, broken])
        order = np.argsort(kept)[:most]
        self.kept, self.adversarial = kept[order], np.concatenate([self.adversarial, images])[order]
        return broken, images
