"""Everything that a card is asked, and whether it is asked rightly."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rst_jax.data.given import check_shape, whole_labels
from rst_jax.evaluation.classifier import KEYS, Classifier
from rst_jax.evaluation.evidence import Examples, Images
from rst_jax.evaluation.programs import Programs
from rst_jax.evaluation.suites import Suite, described
from rst_jax.records import digest
from rst_jax.runtime.files import Pieces
from rst_jax.runtime.workdir import Claim
from rst_jax.threat import ThreatModel

_FORMAT = 2
_PROBED = 16  # images of noise on which two functions are compared


@dataclasses.dataclass(frozen=True)
class Question:
    """What a card is asked.

    Attributes:
      classifier: what is attacked, with the card's name of it.
      examples: with what.
      threat: norm, eps, box.
      suite: by what, in which mode.
      key: of all random samples, key data uint32 [2].
      dataset: the card's name of the images.
      behaviour: what tells the classifier from others: a digest of its program, and its logits on noise.
    """

    classifier: Classifier
    examples: Examples
    threat: ThreatModel
    suite: Suite
    key: np.ndarray
    dataset: str
    behaviour: Mapping[str, np.ndarray]

    @property
    def seed(self) -> str:
        """The key in hexadecimal."""
        return self.key.astype(">u4").tobytes().hex()

    @property
    def box(self) -> list[float]:
        """The smallest and the largest value of a pixel."""
        return [float(self.threat.lower), float(self.threat.upper)]

    @property
    def subject_digest(self) -> str:
        """Of the classifier's weights; where they are not known, of what it does."""
        return self.classifier.digest or digest(dict(self.behaviour))

    def plain(self) -> dict[str, Any]:
        """What must be the same for an evaluation to go on, as question.json holds it."""
        classes, cascades = self.examples.logits.shape[-1], self.suite.cascades
        return {
            "format": _FORMAT,
            "model": digest({"weights": np.asarray(self.subject_digest), **self.behaviour}),
            "images": self.examples.digest,
            "clean logits": digest({"logits": self.examples.logits}),
            "threat models": [f"{c.threat.norm} {float(c.threat.eps)!r} in {self.box}" for c in cascades],
            "attacks": [[described(attack, classes) for attack in c.attacks] for c in cascades],
            "mode": self.suite.mode,
            "seed": self.seed,
        }

    def claim(self, folder: Path) -> Claim:
        """A folder for this evaluation alone."""
        return Claim(folder, "question.json", self.plain(), str(folder), "evaluation", "folder")


def ask(
    programs: Programs,
    classifier: Classifier,
    examples: Examples,
    threat: ThreatModel,
    suite: Suite,
    key: np.ndarray,
    dataset: str,
) -> Question:
    """The question, with what tells the classifier from others."""
    noise = np.random.Generator(np.random.Philox(0)).random((_PROBED, *examples.image_shape), np.float32)
    probe = (threat.lower + (threat.upper - threat.lower) * noise).astype(np.float32)
    behaviour = {
        "program": np.asarray(classifier.program(examples.image_shape)),
        "logits": programs.logits(classifier, probe, len(examples)),
    }
    return Question(classifier, examples, threat, suite, np.asarray(key, np.uint32), dataset, behaviour)


def examine(
    programs: Programs,
    classifier: Classifier,
    images: Images,
    labels: np.ndarray,
    ids: np.ndarray,
    threat: ThreatModel,
) -> Examples:
    """The examples with their clean logits and their digest; every image is read once, batch by batch.

    Labels may come with the images: they are looked at when these were read.

    Raises:
      ValueError: images that are not in the box, logits that are not finite, or labels that name none of them.
    """
    n, logits = len(images), list[np.ndarray]()
    size, placed = programs.sizes(n)[-1], programs.placed(classifier)

    def read() -> Iterator[np.ndarray]:
        for first in range(0, n, size):
            some = np.asarray(images[np.arange(first, min(first + size, n))])
            check_images(some, threat)
            logits.append(programs.logits(placed, some, n))
            yield some

    def read_labels() -> Iterator[np.ndarray]:
        yield labels.astype(np.int32)

    ids, shape = ids.astype(np.int32), np.asarray(images[np.arange(1)]).shape[1:]
    pieces = Pieces((n, *shape), np.dtype(np.float32), read())
    told = {"images": pieces, "labels": Pieces((n,), np.dtype(np.int32), read_labels()), "ids": ids}  # read in order
    examples_digest, clean = digest(told), np.concatenate(logits)
    if not np.isfinite(clean).all():
        place = int(np.flatnonzero(~np.isfinite(clean).all(-1))[0])
        raise ValueError(f"logits must be finite; those of image {place} are {clean[place].tolist()}.")
    return Examples(images, whole_labels(labels, "labels", n, clean.shape[-1]), ids, clean, examples_digest)


def check_images(images: np.ndarray, threat: ThreatModel) -> None:
    """Refuse what are no images of the threat model's box.

    Raises:
      ValueError: says what was expected, and what it was.
    """
    box = f"[{threat.lower:g}, {threat.upper:g}]"
    check_shape(images.shape, "images")
    if images.dtype != np.float32:
        hint = " Divide integers by 255." if np.issubdtype(images.dtype, np.integer) else ""
        raise ValueError(f"images must be float32 in {box}; got {images.dtype}.{hint}")
    low, high = images.min(), images.max()
    if not (low >= np.float32(threat.lower) and high <= np.float32(threat.upper)):
        raise ValueError(f"images must lie in {box}; got values from {low:.4g} to {high:.4g}.")


def check_given(some: np.ndarray, n: int, ids: np.ndarray, threat: ThreatModel) -> None:
    """Refuse images (`some` of n), ids or a radius that are not right, in a sentence.

    Raises:
      ValueError: says what was expected, and what it was.
    """
    check_images(some, threat)
    if ids.shape != (n,) or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"ids must be integers [{n}], one an image; got {ids.dtype} {list(ids.shape)}.")
    if len(np.unique(ids)) < n or not (ids.min() >= -(2**31) and ids.max() < 2**31):
        raise ValueError("ids must be different integers of 32 bits, since random samples follow from them.")
    threat.check_reach(some.shape[1:])


def key_data(key: jax.Array | None) -> np.ndarray:
    """The two words of a random key; of key 0 if there is none.

    Raises:
      ValueError: it is no key of two words (threefry2x32, what `jax.random.key` makes unless told otherwise).
    """
    key = jax.random.key(0, impl=KEYS) if key is None else key
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.key_data(key)
    data = np.asarray(key)
    if data.shape != (2,) or data.dtype != np.uint32:
        raise ValueError(f"key must be one of jax.random.key's, two words of 32 bits; got {data.dtype} {data.shape}.")
    return data
