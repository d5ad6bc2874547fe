"""The published rates of TPU and GPU chips, and topologies made of them."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published rates of one chip.

    Attributes:
      flops: dense bfloat16 operations a second. float32: such ones in full precision (a TPU makes six bfloat16 passes).
      memory: bytes. bandwidth: of the memory, bytes/s.
      link: to its neighbours, bytes/s one way, all links together. network: beyond `island` chips, bytes/s.
      clock: a TPU's cycles a second, in which its compiler estimates; 0 for a GPU.
    """

    flops: float
    float32: float
    memory: float
    bandwidth: float
    link: float
    island: int = 2**30
    network: float = 0.0
    clock: float = 0.0

    def all_reduce(self, size: int, chips: int) -> float:
        """Seconds to sum `size` bytes over so many chips: each byte passes every link twice."""
        return 2 * size * (chips - 1) / chips / (self.link if chips <= self.island else self.network)

    def seconds(self, moved: float, operations: float, *, float32: bool = False) -> float:
        """What takes longer: to move so many bytes, or so many operations."""
        return max(moved / self.bandwidth, operations / (self.float32 if float32 else self.flops))


def _tpu(flops: float, memory: float, bandwidth: float, link: float, clock: float) -> Chip:
    return Chip(flops, flops / 6, memory, bandwidth, link, clock=clock)


CHIPS = {
    "v4": _tpu(275e12, 32e9, 1228e9, 300e9, 1.05e9),
    "v5e": _tpu(197e12, 16e9, 819e9, 200e9, 1.5e9),
    "v5p": _tpu(459e12, 95e9, 2765e9, 600e9, 1.75e9),
    "v6e": _tpu(918e12, 32e9, 1638e9, 400e9, 1.75e9),
    "a100": Chip(312e12, 19.5e12, 80e9, 2039e9, 300e9, 8, 25e9),
    "h100": Chip(989e12, 67e12, 80e9, 3350e9, 450e9, 8, 50e9),
    "h200": Chip(989e12, 67e12, 141e9, 4800e9, 450e9, 8, 50e9),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips of one kind, as a person names them.

    Attributes:
      text: "v5e:4x4", "h200:8".
      name: the chip's. sizes: chips along each axis.
    """

    text: str
    name: str
    sizes: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        """The chip's rates."""
        return CHIPS[self.name]

    @property
    def chips(self) -> int:
        """How many."""
        return math.prod(self.sizes)

    @property
    def gpu(self) -> bool:
        """Whether they are GPUs."""
        return not self.chip.clock


def parse_topology(topology: str) -> Topology:
    """Of "v5e:4x4" or "h200:8": a name of `CHIPS`, and chips along each axis.

    Raises:
      ValueError: it is neither.
    """
    name, _, axes = topology.partition(":")
    sizes = axes.split("x")
    if name not in CHIPS or not all(s.isascii() and s.isdigit() and int(s) for s in sizes):
        raise ValueError(
            f"--topology must be a chip of {', '.join(CHIPS)} and how many, as v5e:4x4 or h200:8; got {topology!r}."
        )
    return Topology(topology, name, tuple(int(s) for s in sizes))


def chip_name(device_kind: str) -> str:
    """The name in `CHIPS` of a device of this machine, from its `device_kind`; "" of one that is not there."""
    kinds = {"v5 lite": "v5e", "v5litepod": "v5e", "v6 lite": "v6e", "v5p": "v5p", "v5": "v5p", "v4": "v4"}
    told = {**{name: name for name in ("a100", "h100", "h200")}, **kinds}
    return next((name for words, name in told.items() if words in device_kind.lower()), "")
