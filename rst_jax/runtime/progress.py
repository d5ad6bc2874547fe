"""What a person sees while they wait: a bar on a terminal, lines elsewhere."""

import sys
import time
from collections.abc import Callable
from typing import Any, Self

from tqdm import tqdm

from rst_jax.runtime.mesh import is_main
from rst_jax.runtime.text import lines

_EVERY = 180.0  # seconds between two lines where there is no terminal

Say = Callable[[str], None]


def make_say(active: bool = True) -> Say:
    """Prints a line for a person, with the seconds since now; nothing when not active."""
    start = time.monotonic()

    def say(text: str) -> None:
        if active:
            tqdm.write(lines(f"[{time.monotonic() - start:6.1f} s] {text}", sys.stdout.encoding), file=sys.stdout)
            sys.stdout.flush()

    return say


def tell(text: str) -> None:
    """A sentence on standard error, beside a bar."""
    tqdm.write(lines(f"rst_jax: {text}", sys.stderr.encoding), file=sys.stderr)
    sys.stderr.flush()


class Progress:
    """A bar with rate and time left on a terminal. Elsewhere a line at each milestone, and one every few minutes.

    Only the first process shows anything.

    Args:
      total: how many units there are; it may be set again. initial: how many of them were done before.
      label: what goes on. unit: of what, in the plural.
      say: prints the lines; on standard error if not given.
    """

    def __init__(self, total: int, initial: int, label: str, unit: str, say: Say = tell):
        self.total, self.n, self.label, self.unit, self.say = total, initial, label, unit, say
        terminal = sys.stderr.isatty()
        self._bar: Any = tqdm(
            total=total,
            initial=initial,
            desc=label,
            unit=unit,
            disable=not (is_main() and terminal),
            dynamic_ncols=True,
            leave=False,
        )
        self._lines = is_main() and not terminal
        self._told = time.monotonic()
        self._first: tuple[float, int] | None = None  # when the first units were done, and how many

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, units: int, about: Callable[[], str] = str) -> None:
        """So many more are done; `about` tells more, where a line is due."""
        self.n += units
        self._first = self._first or (time.monotonic(), self.n)
        self._bar.update(units)
        if self._lines and time.monotonic() - self._told >= _EVERY:
            self.milestone(about())

    def skip(self, units: int) -> None:
        """So many more were done before."""
        self.n += units
        if self._first:
            self._first = self._first[0], self._first[1] + units
        self._bar.update(units)

    def show(self, about: str) -> None:
        """Tell more on a terminal."""
        self._bar.total = self.total
        self._bar.set_postfix_str(about)

    def milestone(self, about: str) -> None:
        """A line, or what a terminal shows."""
        self.show(about)
        if self._lines:
            self._told = time.monotonic()
            there = f"{self.label}: {about}{'; ' * bool(about)}{self.n:,} of {self.total:,} {self.unit}"
            self.say(there + self._speed())

    def _speed(self) -> str:
        """The rate since the first units (which wait for a compilation), and what it says of the rest."""
        began, done = self._first or (0.0, self.n)
        if self.n == done or (seconds := time.monotonic() - began) <= 0:
            return ""
        rate = (self.n - done) / seconds
        left = f", {_time((self.total - self.n) / rate)} left" if self.total > self.n else ""
        return f", {f'{rate:,.3g}' if rate < 100 else f'{rate:,.0f}'} {self.unit}/s{left}"

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()


def _time(seconds: float) -> str:
    """1 h 05 min, 3 min 20 s, 12 s."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    return f"{s // 60} min {s % 60:02} s" if s < 3600 else f"{s // 3600:,} h {s % 3600 // 60:02} min"
