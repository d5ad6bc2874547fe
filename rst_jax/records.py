"""Results and where they come from, as dataclasses that go to JSON and back.

Accuracies are fractions in [0, 1]. A figure never stands alone: a record carries the attack, the number of
examples, the seed, the precision, the machine and the digest of what was measured.
"""

import dataclasses
import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal

import jax
import numpy as np
from msgspec import Meta

from rst_jax.runtime.door import read_json as read_json
from rst_jax.runtime.files import digest as digest
from rst_jax.version import __version__

_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
PRECISION = "float32, highest matmul precision"  # of every evaluation
Fraction = Annotated[float, Meta(ge=0, le=1 + 1e-9)]
Count = Annotated[int, Meta(ge=0)]
Size = Annotated[float, Meta(ge=0)]
Norm = Literal["linf", "l2"]


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
    norm: Norm
    eps: Size
    steps: Count
    step_size: Size
    restarts: Count
    seed: int


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """A fraction of n examples with its 95 % Wilson interval."""

    value: Fraction
    low: Fraction
    high: Fraction
    n: Count


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
    remaining_ratio: Fraction
    weights_kept: Count
    weights_total: Count
    natural: Accuracy
    robust: Accuracy
    violations: Count
    attack: AttackRecord
    dataset: str
    model: str
    precision: str
    selected_on: str
    best_epoch: Count
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
    ratios: list[Fraction]
    natural: list[Fraction]
    robust: list[list[Fraction]]
    n: Count
    attack: AttackRecord
    digests: list[str]
    provenance: Provenance

    def __post_init__(self) -> None:
        _as_many(self.names, self.ratios, self.natural, self.robust, self.digests, *self.robust)


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
    probabilities: list[Fraction]
    switching: str
    natural: Fraction
    transfer_only: Fraction
    worst_of_pool: Fraction
    best_single: Fraction
    best_single_name: str
    n: Count
    attack: AttackRecord
    digests: list[str]
    provenance: Provenance

    def __post_init__(self) -> None:
        _as_many(self.names, self.probabilities, self.digests)


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
    effect: Literal["suspect", "invalid"]
    measured: str
    means: str


@dataclasses.dataclass(frozen=True)
class Curve:
    """Robust accuracy after so much effort, in ascending order."""

    effort: list[Count]
    robust: list[Fraction]

    def __post_init__(self) -> None:
        _as_many(self.effort, self.robust)


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
    norm: Norm
    eps: Size
    attacks: list[str]
    rounds: list[Count]
    robust: Accuracy
    broken: dict[str, Count]
    unverified: Count
    fragile: list[int]
    median_distance: Size | None
    queries: Count
    gradients: Count
    over_passes: Curve
    over_rounds: Curve | None
    failed: int = 0


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Robust accuracy of the first n examples at growing eps, from 0 to where every image can be reached."""

    attack: str
    norm: Norm
    eps: list[Size]
    robust: list[Fraction]
    n: Count

    def __post_init__(self) -> None:
        _as_many(self.eps, self.robust)


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
    n: Count
    box: Annotated[list[float], Meta(min_length=2, max_length=2)]
    mode: str
    seed: str
    precision: str
    clean: Accuracy
    rows: list[CascadeRecord]
    sweep: Sweep | None
    checks: list[Check]
    verdict: str
    provenance: Provenance

    def __post_init__(self) -> None:
        effects = {check.effect for check in self.checks if not check.passed}
        worst = next((effect for effect in ("invalid", "suspect") if effect in effects), "trustworthy")
        if self.verdict.split(":")[0] != worst or not self.box[0] < self.box[1]:
            raise ValueError(f"its checks say {worst}, its verdict {self.verdict!r}; its box is {self.box}")


def _as_many(*lists: list) -> None:
    """Refuse lists that go together and are of different lengths."""
    if len(set(map(len, lists))) > 1:
        raise ValueError(f"lists of {', '.join(map(str, map(len, lists)))} entries; expected as many in each")


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
    try:
        run = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(run, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def accuracy(correct: np.ndarray) -> Accuracy:
    """The mean of bool [N] with its 95 % Wilson score interval (Wilson, 1927); to import SciPy's takes a second."""
    n = len(correct)
    if not n:
        raise ValueError("accuracy of no examples: expected at least one.")
    z, p = 1.959963984540054, float(np.mean(correct))
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = float(max(centre - half, 0.0)), float(min(centre + half, 1.0))
    return Accuracy(p, min(low, p), max(high, p), n)  # rounding may leave 0 and 1 just outside
