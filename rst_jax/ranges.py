"""Which numbers a setting takes: always finite ones, in a range that its type tells."""

import dataclasses
import math
import typing
from typing import Annotated, Any


@dataclasses.dataclass(frozen=True)
class Range:
    """From `least` to `most`, both included unless named in `without`."""

    least: float
    most: float
    without: tuple[float, ...] = ()

    def expected(self, value: float) -> str:
        """What was expected instead of `value`, as in "must be at least 1"; "" if it is in the range."""
        if value != value:
            return "a number"
        if value < self.least or value == self.least in self.without:
            return f"{'above' if self.least in self.without else 'at least'} {_short(self.least)}"
        if value > self.most or value == self.most in self.without:
            return f"{'below' if self.most in self.without else 'at most'} {_short(self.most)}"
        return ""


Count = Annotated[int, Range(0, 2**31 - 1)]
Steps = Annotated[int, Range(0, 10**5)]  # of an attack: some loops are written out
Pixels = Annotated[int, Range(0, 2**12)]
Positive = Annotated[int, Range(1, 2**31 - 1)]
Seed = Annotated[int, Range(0, 2**32, without=(2**32,))]
Length = Annotated[float, Range(0, 1e4)]  # in image units: a radius or a step
Rate = Annotated[float, Range(0, 1e38)]  # of learning, or of decay
Minutes = Annotated[float, Range(0, 1e7)]
Share = Annotated[float, Range(0, 1)]
ShareBelowOne = Annotated[float, Range(0, 1, without=(1,))]
ShareAboveZero = Annotated[float, Range(0, 1, without=(0,))]


def taken_apart(kind: Any) -> tuple[Any, Range | None]:
    """A type, and the range that belongs to it; of a type or nothing, those of the type."""
    if type(None) in typing.get_args(kind):
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is Annotated:
        bare, *told = typing.get_args(kind)
        return bare, next((each for each in told if isinstance(each, Range)), None)
    return kind, None


def check(settings: Any, prefix: str = "") -> None:
    """Look at every number of a dataclass, and of the dataclasses in it, that has a range.

    Raises:
      ValueError: one is out of its range, or is none.
    """
    for field in dataclasses.fields(settings):
        name, value = prefix + field.name, getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            check(value, name + ".")
            continue
        kind, several = field.type, typing.get_origin(field.type) is tuple
        for one in value if several else (value,):
            _, limits = taken_apart(typing.get_args(kind)[0] if several else kind)
            if limits and one is not None and (expected := limits.expected(one)):
                raise ValueError(f"{name} must be {expected}; got {_short(one)}.")


def _short(number: float) -> str:
    """As it is written, where that is short."""
    if isinstance(number, int) and number.bit_length() > 64:
        return f"one of {math.floor(number.bit_length() * math.log10(2)) + 1} digits"
    return "2**32" if number == 2**32 else f"{number!r}" if isinstance(number, int) else f"{number:.12g}"
