"""A compiled program's text, line by line: computations of instructions."""

import dataclasses
import math
import re
from collections.abc import Iterator

_BITS = {
    **dict.fromkeys(["token", "opaque"], 0),
    **dict.fromkeys(["s4", "u4"], 4),
    **dict.fromkeys(["pred", "s8", "u8", "f8e4m3fn", "f8e5m2"], 8),
    **dict.fromkeys(["bf16", "f16", "s16", "u16"], 16),
    **dict.fromkeys(["f64", "s64", "u64", "c64"], 64),
}
_HEADING = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array's element type and sizes, and whether it lies on the chip and not in the device's memory."""

    kind: str
    sizes: tuple[int, ...]
    on_chip: bool

    @property
    def elements(self) -> int:
        """How many numbers."""
        return math.prod(self.sizes)

    @property
    def whole(self) -> int:
        """Its bytes, wherever it lies."""
        return -(-self.elements * _BITS.get(self.kind, 32) // 8)

    @property
    def bytes(self) -> int:
        """Of the device's memory."""
        return 0 if self.on_chip else self.whole


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of the text: `name = shapes opcode(operands), attributes`; the operands of a parameter are its number."""

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool

    @property
    def bytes(self) -> int:
        """Of the result, in the device's memory."""
        return sum(shape.bytes for shape in self.shapes)

    def called(self, *words: str) -> list[str]:
        """The computations that it names as `word=`."""
        found = re.findall(rf"\b(?:{'|'.join(words)})=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
        return [name for names in found for name in re.findall(r"[\w.\-]+", names)]

    def told(self, pattern: str, otherwise: str = "") -> str:
        """What the attributes say."""
        match = re.search(pattern, self.attributes)
        return match[1] if match else otherwise


Computation = dict[str, Instruction]


def computations(text: str) -> tuple[dict[str, Computation], str]:
    """The computations by name, and the name of the one that a call executes."""
    found: dict[str, Computation] = {}
    entry, here = "", Computation()
    for line in text.splitlines():
        if not line.startswith(" "):
            if heading := _HEADING.match(line):
                here = found.setdefault(heading[2], {})
                entry = heading[2] if heading[1] else entry
        elif match := _NAME.match(line):
            here[match[2]] = _instruction(line, match)
    return found, entry


def _instruction(line: str, match: re.Match) -> Instruction:
    at = match.end()
    end = _closing(line, at) if line[at] == "(" else line.index(" ", at)
    opening = line.index("(", end)
    closing = _closing(line, opening)
    inside = line[opening + 1 : closing - 1]
    opcode = line[end:opening].strip()
    operands = (inside,) if opcode in ("parameter", "constant") else tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(match[2], tuple(_shapes(line[at:end])), opcode, operands, line[closing:], bool(match[1]))


def _closing(line: str, opening: int) -> int:
    """The place after the bracket that closes the one at `opening`."""
    depth = 0
    for bracket in re.finditer(r"[()]", line[opening:]):
        depth += 1 if bracket[0] == "(" else -1
        if not depth:
            return opening + bracket.end()
    raise ValueError(f"no compiled program's text: a bracket is not closed in {line[:80]!r}.")


def _shapes(text: str) -> Iterator[Shape]:
    for kind, sizes, layout in _SHAPE.findall(text):
        yield Shape(
            kind, tuple(int(n.lstrip("<=")) for n in sizes.split(",") if n), bool(re.search(r"S\([1-9]", layout))
        )
