"""What a compiled program's text tells: its kernels, what each moves and computes, how often it runs; its collectives.

A kernel is what the device executes: not the tuples and bitcasts between. One in a loop runs as often as the loop goes
round, where that is in the text (else once). It moves its operands and its results; of an operand that it only takes
slices of, those; nothing for what lies on the chip itself (TPU). Of the branches of a conditional the cheapest counts.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Sequence

from rst_jax.planning.instructions import Computation, Instruction, Shape, computations
from rst_jax.runtime.operations import convolution


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An executed instruction.

    Attributes:
      name, opcode: as in the text.
      source: the operation that it, or the last in it that says so, came from: a path of scopes.
      runs: in one call of the program.
      bytes: of one run, to and from the device's memory.
      operations: of one run: those of its convolutions and products, by formula. float32: whether in that type.
      cycles: of one run, by the compiler's own estimate; None where there is none.
    """

    name: str
    opcode: str
    source: str
    runs: int
    bytes: int
    operations: float
    float32: bool
    cycles: int | None


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of the compiled program: its kind, bytes a chip, and whether it is inside a loop (the attack's)."""

    kind: str
    bytes: int
    in_loop: bool


_COLLECTIVES = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
COLLECTIVE = re.compile(rf"({_COLLECTIVES})(?:-start)?")
_NO_KERNEL = re.compile(
    r"parameter|constant|get-tuple-element|tuple|bitcast|after-all|opt-barrier|add-dependency|partition-id|replica-id"
    r"|.*-done|.*-update"
)
_SOURCE = r'op_name="([^"]*)"'
_SLICES = ("gather", "dynamic-slice", "slice")


class Program:
    """A compiled program's text, taken apart.

    Attributes:
      computations: by name. entry: the name of the one that a call executes.
    """

    def __init__(self, text: str):
        self.computations, self.entry = computations(text)

    @functools.cached_property
    def kernels(self) -> list[Kernel]:
        """What a call executes."""
        return list(self._executed(self.entry, 1))

    @functools.cached_property
    def collectives(self) -> list[Collective]:
        """Each with the bytes of its result."""

        def visit(name: str, in_loop: bool) -> Iterator[Collective]:
            for each in self.computations[name].values():
                if match := COLLECTIVE.fullmatch(each.opcode):
                    yield Collective(match[1], sum(s.whole for s in each.shapes), in_loop)
                inside = in_loop or each.opcode == "while"
                for called in self._calls(each) + (each.called("calls") if each.opcode != "fusion" else []):
                    yield from visit(called, inside)

        return list(visit(self.entry, False))

    def _calls(self, each: Instruction) -> list[str]:
        """The computations that it executes."""
        if each.opcode == "conditional":
            return each.called("branch_computations", "true_computation", "false_computation")
        return (
            each.called({"while": "body", "call": "to_apply"}[each.opcode]) if each.opcode in ("while", "call") else []
        )

    def _executed(self, name: str, runs: int) -> Iterator[Kernel]:
        for each in self.computations[name].values():
            called = self._calls(each)
            if each.opcode == "conditional":
                branches = [list(self._executed(branch, runs)) for branch in called]
                yield from min(branches, key=lambda kernels: sum(k.runs * k.bytes for k in kernels))
            elif called:
                again = self._trips(each) if each.opcode == "while" else 1
                for inner in called:
                    yield from self._executed(inner, runs * again)
            elif not _NO_KERNEL.fullmatch(each.opcode):
                yield self._kernel(self.computations[name], each, runs)

    def _trips(self, loop: Instruction) -> int:
        """How often a loop goes round: as it says, or up to what its condition compares a counter from zero with."""
        if said := loop.told(r'known_trip_count":\{"n":"(\d+)"'):
            return int(said)
        condition = self.computations[loop.called("condition")[0]]
        root = next(each for each in condition.values() if each.root)
        if root.opcode == "compare" and "direction=LT" in root.attributes:
            limits = [condition[name] for name in root.operands if condition[name].opcode == "constant"]
            if limits and limits[0].operands[0].isdigit():
                return int(limits[0].operands[0])
        return 1

    def _kernel(self, scope: Computation, each: Instruction, runs: int) -> Kernel:
        inner = self.computations[each.called("calls")[0]] if each.opcode == "fusion" else None
        operations, float32 = self._operations(scope, each)
        cycles = each.told(r'"estimated_cycles":"(\d+)"')
        inside = [part.told(_SOURCE) for part in reversed((inner or {}).values())]
        return Kernel(
            each.name,
            each.opcode,
            next(filter(None, [each.told(_SOURCE), *inside]), ""),
            runs,
            _moved(scope, each, inner),
            operations,
            float32,
            int(cycles) if cycles else None,
        )

    def _operations(self, scope: Computation, each: Instruction) -> tuple[float, bool]:
        """Of the convolutions and products in it, and whether any has float32 operands."""
        if each.opcode == "fusion":
            inner = self.computations[each.called("calls")[0]]
            found = [self._operations(inner, part) for part in inner.values()]
            return sum(n for n, _ in found), any(wide for _, wide in found)
        operands = [scope[name].shapes[0] for name in each.operands if name in scope and scope[name].shapes]
        count = _count(each, operands)
        return count, bool(count) and operands[0].kind == "f32"


def _moved(scope: Computation, each: Instruction, inner: Computation | None) -> int:
    """Bytes between the chip and its memory, in one run."""
    names = dict.fromkeys(each.operands)
    if each.opcode.endswith("-start") and not COLLECTIVE.fullmatch(each.opcode):
        to = each.shapes[len(names)] if len(each.shapes) > len(names) else each.shapes[0]
        return to.bytes + sum(min(shape.bytes, to.whole) for name in names for shape in scope[name].shapes)
    moved = _written(scope, each, inner)
    for name in names:
        whole = scope[name].bytes
        if inner is None:
            read = _taken(each, name, whole)
        else:
            numbers = {str(i) for i, operand in enumerate(each.operands) if operand == name}
            places = [p.name for p in inner.values() if p.opcode == "parameter" and p.operands[0] in numbers]
            read = sum(_read(inner, place, whole) for place in places)
        moved += min(whole, read)
    return moved


def _written(scope: Computation, each: Instruction, inner: Computation | None) -> int:
    """Of the result; of one that is an array with a part put in its place, that part."""
    root, there = (each, scope) if inner is None else (next(part for part in inner.values() if part.root), inner)
    if root.opcode == "dynamic-update-slice":
        return min(each.bytes, sum(s.whole for s in there[root.operands[1]].shapes))
    return each.bytes


def _read(inner: Computation, name: str, whole: int) -> int:
    """What a fusion reads of its parameter."""
    users = [part for part in inner.values() if name in part.operands]
    total = 0
    for user in users:
        total += _read(inner, user.name, whole) if user.opcode == "bitcast" else _taken(user, name, whole)
    return total


def _taken(user: Instruction, name: str, whole: int) -> int:
    """What an instruction reads of its operand `name`."""
    if user.opcode in _SLICES and user.operands[0] == name:
        return sum(shape.whole for shape in user.shapes)
    if user.opcode == "dynamic-update-slice" and user.operands[0] == name:
        return 0
    return whole


def _count(each: Instruction, operands: Sequence[Shape]) -> float:
    """Multiply-adds, as two operations each, of a convolution or product; 0 of another instruction."""
    target = each.told(r'custom_call_target="([^"]*)"')
    if each.opcode == "convolution" or "$conv" in target:
        # cuDNN's gradients keep the labels of the convolution that they are of.
        image, kernel, out = operands[0], operands[1], each.shapes[0]
        if "BackwardInput" in target:
            image, out = out, image
        elif "BackwardFilter" in target:
            kernel, out = out, kernel
        return _convolution(each.told(r"dim_labels=([\w>\-]+)"), image.sizes, kernel.sizes, out.sizes)
    if each.opcode == "dot" or "gemm" in target or "matmul" in target:
        axes = each.told(r"lhs_contracting_dims=\{([\d,]*)") or each.told(r'lhs_contracting_dimensions":\[([\d",]*)')
        summed = [operands[0].sizes[int(axis)] for axis in re.findall(r"\d+", axes)]
        return 2.0 * each.shapes[0].elements * math.prod(summed)
    return 0.0


def _convolution(labels: str, image: Sequence[int], kernel: Sequence[int], out: Sequence[int]) -> float:
    names = re.split("_|->", labels)  # b01f_01io->b01f
    of_image, of_kernel, of_out = (dict(zip(*s, strict=True)) for s in zip(names, (image, kernel, out), strict=True))
    axes = [(of_image[axis], of_kernel[axis], of_out[axis]) for axis in of_image if axis.isdigit()]
    return float(convolution(of_out["b"] * of_out["f"], of_kernel["i"], axes))
