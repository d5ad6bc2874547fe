"""Kernels counted: how many, what they move and how long that takes at the chip's published rates, by kind and part."""

import dataclasses
import re
from collections.abc import Iterable

from rst_jax.planning.chips import Chip
from rst_jax.planning.hlo import COLLECTIVE, Kernel

# In the order of a table. Between convolutions lie normalisation, rectifiers and sums of a residual network; a copy is
# also what the compiler adds and gives no source.
KINDS = ("convolution", "normalisation", "attack", "masks", "update", "data", "collective", "copy")
_SCOPE = re.compile(r"\b(attack|gradient|masks|update|data)\b")


@dataclasses.dataclass(frozen=True)
class Counts:
    """Of some kernels, each as often as it runs.

    Attributes:
      kernels: how many are executed.
      bytes, operations: that they move and compute.
      seconds: the sum over kernels of the larger of bytes and operations at the chip's published rates.
      estimate: seconds by the compiler's own estimates; None where it gives none.
    """

    kernels: int
    bytes: int
    operations: float
    seconds: float
    estimate: float | None

    @property
    def best(self) -> float:
        """The compiler's seconds, or those by the published rates."""
        return self.seconds if self.estimate is None else self.estimate


def count(kernels: Iterable[Kernel], chip: Chip, share: int = 1) -> Counts:
    """Counts of kernels, over `share` (passes that they are of)."""
    kernels = list(kernels)
    cycles = [k.runs * k.cycles for k in kernels if k.cycles is not None]
    return Counts(
        sum(k.runs for k in kernels) // share,
        sum(k.runs * k.bytes for k in kernels) // share,
        sum(k.runs * k.operations for k in kernels) / share,
        sum(seconds(k, chip) for k in kernels) / share,
        sum(cycles) / chip.clock / share if chip.clock else None,
    )


def seconds(kernel: Kernel, chip: Chip) -> float:
    """Of all runs of a kernel, by the published rates."""
    return kernel.runs * chip.seconds(kernel.bytes, kernel.operations, float32=kernel.float32)


def kind_of(kernel: Kernel) -> str:
    """One of `KINDS`: what it computes, or else the part of the step that it is in."""
    if COLLECTIVE.fullmatch(kernel.opcode):
        return "collective"
    if kernel.operations:
        return "convolution"
    scope = scope_of(kernel)
    if scope in ("attack", "gradient"):
        return "normalisation" if "jvp(" in kernel.source or scope == "gradient" else "attack"
    return scope or "copy"


def scope_of(kernel: Kernel) -> str:
    """The part of the step that it is in: attack, gradient, masks, update or data; "" where the text does not say."""
    match = _SCOPE.search(kernel.source)
    return match[1] if match else ""


def by_kind(kernels: Iterable[Kernel], chip: Chip) -> dict[str, Counts]:
    """Counts of each kind that is there."""
    kernels = list(kernels)
    told = {kind: [k for k in kernels if kind_of(k) == kind] for kind in KINDS}
    return {kind: count(some, chip) for kind, some in told.items() if some}


def kernels_text(kernels: Iterable[Kernel], chip: Chip, most: int) -> str:
    """The kernels that take longest, for a terminal."""
    order = sorted(kernels, key=lambda k: -_best(k, chip))[:most]
    lines = [f"  {'runs':>5} {'MB a run':>9} {'GFLOP':>7} {'ms in all':>9}  kind           kernel, source"]
    for k in order:
        where = k.source.removeprefix("jit(steps)/")
        lines.append(
            f"  {k.runs:5} {k.bytes / 1e6:9.2f} {k.operations / 1e9:7.2f} {1e3 * _best(k, chip):9.3f}  {kind_of(k):14} "
            f"{k.name}, {where}"
        )
    return "\n".join(lines)


def _best(kernel: Kernel, chip: Chip) -> float:
    return count([kernel], chip).best if kernel.cycles is not None else seconds(kernel, chip)
