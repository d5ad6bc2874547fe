"""The published rates of TPU and GPU chips, and topologies made of them."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published rates of one chip.

    Attributes:
      flops: dense bfloat16 operations a second.
      memory: bytes. bandwidth: of the memory, bytes/s.
      link: to its neighbours, bytes/s one way, all links together. network: beyond `island` chips, bytes/s.
    """

    flops: float
    memory: float
    bandwidth: float
    link: float
    island: int = 2**30
    network: float = 0.0

    def all_reduce(self, size: int, chips: int) -> float:
        """Seconds to sum `size` bytes over so many chips: each byte passes every link twice."""
        return 2 * size * (chips - 1) / chips / (self.link if chips <= self.island else self.network)


CHIPS = {
    "v4": Chip(275e12, 32e9, 1228e9, 300e9),
    "v5e": Chip(197e12, 16e9, 819e9, 200e9),
    "v5p": Chip(459e12, 95e9, 2765e9, 600e9),
    "v6e": Chip(918e12, 32e9, 1638e9, 400e9),
    "a100": Chip(312e12, 80e9, 2039e9, 300e9, 8, 25e9),
    "h100": Chip(989e12, 80e9, 3350e9, 450e9, 8, 50e9),
    "h200": Chip(989e12, 141e9, 4800e9, 450e9, 8, 50e9),
}


def parse_topology(topology: str) -> tuple[Chip, int]:
    """The chip and how many of "v5e:4x4" or "h200:8": a name of `CHIPS`, and chips along each axis.

    Raises:
      ValueError: it is neither.
    """
    name, _, axes = topology.partition(":")
    sizes = axes.split("x")
    if name not in CHIPS or not all(s.isdigit() and int(s) for s in sizes):
        raise ValueError(
            f"--topology must be a chip of {', '.join(CHIPS)} and how many, as v5e:4x4 or h200:8; got {topology!r}."
        )
    return CHIPS[name], math.prod(int(s) for s in sizes)
