"""What a compiled program's text tells: its collectives, how large they are, and whether they are in a loop."""

import dataclasses
import math
import re


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of the compiled program: its kind, bytes a chip, and whether it is inside a loop (the attack's)."""

    kind: str
    bytes: int
    in_loop: bool


_KINDS = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
_INSTRUCTION = re.compile(rf"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ({_KINDS})(?:-start)?\(")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8}


def collectives(hlo: str) -> list[Collective]:
    """The collectives of a compiled program's text, each with the bytes of its result."""
    found: list[tuple[str, str, int]] = []
    callers: dict[str, set[str]] = {}
    loops: set[str] = set()
    here = ""
    for line in hlo.splitlines():
        if heading := _COMPUTATION.match(line):
            here = heading[1]
            continue
        for names in _CALLED.findall(line):
            for name in re.findall(r"[\w.\-]+", names):
                callers.setdefault(name, set()).add(here)
                if " while(" in line:
                    loops.add(name)
        if match := _INSTRUCTION.match(line):
            sizes = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
            size = sum(_BYTES.get(kind, 4) * math.prod(int(d) for d in dims.split(",") if d) for kind, dims in sizes)
            found.append((here, match[2], size))

    def in_loop(name: str) -> bool:
        return name in loops or any(in_loop(caller) for caller in callers.get(name, ()))

    return [Collective(kind, size, in_loop(place)) for place, kind, size in found]
