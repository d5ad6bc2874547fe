"""Figures as text: percentages with their intervals, radii, tables for a terminal."""

from collections.abc import Sequence

from rst_jax.records import Accuracy
from rst_jax.runtime.text import plain


def percent(a: Accuracy) -> str:
    """With its 95 % interval: 47.8 [44.7, 50.9]."""
    return f"{100 * a.value:.1f} [{100 * a.low:.1f}, {100 * a.high:.1f}]"


def radius(eps: float) -> str:
    """8/255 as such, other radii as decimals."""
    levels = eps * 255
    return f"{round(levels)}/255" if eps and abs(levels - round(levels)) < 1e-6 else f"{eps:.4g}"


def columns(header: Sequence[str], rows: Sequence[Sequence[str]], right: bool) -> list[str]:
    """The lines of a table, ruled below its header; `right`: all columns but the first end on the right."""
    header, rows = [plain(cell) for cell in header], [[plain(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        placed = [cell.rjust(width) if right else cell.ljust(width) for cell, width in others]
        return "  ".join([first[0].ljust(first[1]), *placed]).rstrip()

    return [line(header), "  ".join("-" * width for width in widths), *map(line, rows)]
