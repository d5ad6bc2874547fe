"""Results and where they come from, as dataclasses that go to JSON and back.

Accuracies are fractions in [0, 1]. A figure never stands alone: a record carries the attack, the number of
examples, the seed, the precision, the machine and the digest of what was measured.
"""

import dataclasses
import datetime
import hashlib
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import TypeVar

import jax
import msgspec
import numpy as np
from jaxtyping import PyTree

from rst_jax.runtime.files import Pieces
from rst_jax.version import __version__

_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
PRECISION = "float32, highest matmul precision"  # of every evaluation
R = TypeVar("R")


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Where and with what a figure was made."""

    created: str
    version: str
    revision: str
    libraries: dict[str, str]
    hardware: str
    python: str


@dataclasses.dataclass(frozen=True)
class AttackRecord:
    """An attack, fully named. Sizes in [0, 1] image units."""

    name: str
    norm: str
    eps: float
    steps: int
    step_size: float
    restarts: int
    seed: int


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """A fraction of n examples with its 95 % Wilson interval."""

    value: float
    low: float
    high: float
    n: int


@dataclasses.dataclass(frozen=True)
class TicketRecord:
    """One ticket (or the dense network) measured on the test images.

    Attributes:
      name: the run's name, "ratio-0.1" or "dense".
      remaining_ratio: 1.0 for the dense network.
      weights_kept, weights_total: counts over all kernels.
      violations: adversarial images that left the ball or the box; they do not count as robust.
      best_epoch: where the checkpoint was taken, chosen on `selected_on`.
      kind: what it is, as a ticket's ("scratch", "dense"); records of version 0.3.0 tell it by the name alone.
    """

    name: str
    remaining_ratio: float
    weights_kept: int
    weights_total: int
    natural: Accuracy
    robust: Accuracy
    violations: int
    attack: AttackRecord
    dataset: str
    model: str
    precision: str
    selected_on: str
    best_epoch: int
    seed: int
    digest: str
    provenance: Provenance
    kind: str = ""

    def __post_init__(self) -> None:
        if not self.kind:
            object.__setattr__(self, "kind", "dense" if self.name == "dense" else "scratch")


@dataclasses.dataclass(frozen=True)
class TransferRecord:
    """robust[i][j]: accuracy of ticket j on the adversarial images made against ticket i."""

    names: list[str]
    ratios: list[float]
    natural: list[float]
    robust: list[list[float]]
    n: int
    attack: AttackRecord
    digests: list[str]
    provenance: Provenance


@dataclasses.dataclass(frozen=True)
class R2SRecord:
    """Random switching between tickets, exact by enumeration of the picks.

    Attributes:
      switching: what one pick covers.
      natural: expected accuracy on clean images.
      transfer_only: expected accuracy when the adversary attacks one ticket picked like the defender's (the
        paper's figure); it overstates the defence.
      worst_of_pool: for each example the adversarial image, among those made against each ticket, with the
        lowest expected accuracy; an upper bound on what a stronger adversary leaves.
      best_single: the highest robust accuracy of one ticket, and its name.
    """

    names: list[str]
    probabilities: list[float]
    switching: str
    natural: float
    transfer_only: float
    worst_of_pool: float
    best_single: float
    best_single_name: str
    n: int
    attack: AttackRecord
    digests: list[str]
    provenance: Provenance


@dataclasses.dataclass(frozen=True)
class Check:
    """Something that had to hold for a figure to mean what it says.

    Attributes:
      effect: "suspect" or "invalid": what the verdict is if it did not pass.
      measured: what was found, and what was allowed.
      means: what it means if it did not pass.
    """

    name: str
    passed: bool
    effect: str
    measured: str
    means: str


@dataclasses.dataclass(frozen=True)
class Curve:
    """Robust accuracy after so much effort, in ascending order."""

    effort: list[int]
    robust: list[float]


@dataclasses.dataclass(frozen=True)
class CascadeRecord:
    """A cascade of attacks and what stood.

    Attributes:
      attacks: each with its settings. rounds: restarts or targets of each. broken: examples that each broke, verified.
      unverified: claims that did not hold when run again; they are not counted.
      failed: examples that nothing broke but that do not count as robust, since an attack of them ended in an image
        that is not finite or not allowed.
      fragile: ids of the broken examples whose margin is within 1e-4 of the boundary.
      median_distance: of the closest adversarial images of a minimal-norm attack over the examples classified right, in
        L2; None where not measured (or where less than half have one).
      queries, gradients: passes over all examples.
      over_passes: robust accuracy when an example is given so many passes.
      over_rounds: after so many restarts or targets, where the cascade is one attack that has several.
    """

    name: str
    norm: str
    eps: float
    attacks: list[str]
    rounds: list[int]
    robust: Accuracy
    broken: dict[str, int]
    unverified: int
    fragile: list[int]
    median_distance: float | None
    queries: int
    gradients: int
    over_passes: Curve
    over_rounds: Curve | None
    failed: int = 0


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Robust accuracy of the first n examples at growing eps, from 0 to where every image can be reached."""

    attack: str
    norm: str
    eps: list[float]
    robust: list[float]
    n: int


@dataclasses.dataclass(frozen=True)
class CardRecord:
    """An evaluation that can be doubted point by point; its cascades are called `rows`.

    Attributes:
      subject: what was evaluated; subject_digest: of its weights, or of its program and its logits on noise.
      images_digest: of images, labels and ids.
      box: the smallest and the largest value of a pixel.
      mode: "default", or "faithful" to the published attacks' quirks.
      seed: key data of the random key, in hexadecimal.
      verdict: "trustworthy", "suspect: why" or "invalid: why".
    """

    subject: str
    subject_digest: str
    dataset: str
    images_digest: str
    n: int
    box: list[float]
    mode: str
    seed: str
    precision: str
    clean: Accuracy
    rows: list[CascadeRecord]
    sweep: Sweep | None
    checks: list[Check]
    verdict: str
    provenance: Provenance


def provenance() -> Provenance:
    """This moment, this machine, these versions."""
    devices = jax.devices()
    return Provenance(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        version=__version__,
        revision=_revision(),
        libraries={name: metadata.version(name) for name in _LIBRARIES},
        hardware=f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform}), {os.cpu_count()} host cores",
        python=platform.python_version(),
    )


def _revision() -> str:
    here = Path(__file__).parent
    try:
        run = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(run, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def accuracy(correct: np.ndarray) -> Accuracy:
    """The mean of bool [N] with its 95 % Wilson score interval (Wilson, 1927).

    Six lines by hand: to import SciPy's takes a second, half of a small evaluation.
    """
    n = len(correct)
    if not n:
        raise ValueError("accuracy of no examples: expected at least one.")
    z, p = 1.959963984540054, float(np.mean(correct))
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = float(max(centre - half, 0.0)), float(min(centre + half, 1.0))
    return Accuracy(p, min(low, p), max(high, p), n)  # rounding may leave 0 and 1 just outside


def digest(*trees: PyTree) -> str:
    """SHA-256 over the paths, shapes, types and bytes of the arrays, or of `Pieces`, read one after the other."""
    sum_ = hashlib.sha256()
    for tree in trees:
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            array = leaf if isinstance(leaf, Pieces) else np.asarray(leaf)
            sum_.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
            for piece in array if isinstance(array, Pieces) else (array,):
                sum_.update(np.ascontiguousarray(piece).tobytes())
    return sum_.hexdigest()


def read_json(path: Path, kind: type[R]) -> R:
    """A record of class `kind`.

    Raises:
      ValueError: the file is not such a record; it is named.
    """
    try:
        return msgspec.convert(json.loads(path.read_text()), kind)
    except (OSError, ValueError, msgspec.ValidationError) as error:
        raise ValueError(f"{path}: expected a {kind.__name__}; {error}.") from error
