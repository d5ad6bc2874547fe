"""What a sweep found, as papers show it: a line a group of runs that differ in their seed, and its plots."""

import csv
import dataclasses
import io
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rst_jax.config import near
from rst_jax.records import AttackRecord, TicketRecord
from rst_jax.reports.page import CYCLE, figure_of, label, render, svg
from rst_jax.reports.text import columns, radius
from rst_jax.runtime.files import write_json, write_text


@dataclasses.dataclass(frozen=True)
class Measured:
    """A ticket's record and where it comes from: the point of a sweep and its group."""

    point: str
    group: str
    record: TicketRecord


@dataclasses.dataclass(frozen=True)
class Spread:
    """The mean of n runs and their standard deviation (over n - 1; None of a single run), as fractions."""

    mean: float
    deviation: float | None
    n: int


@dataclasses.dataclass(frozen=True)
class Line:
    """The tickets of one name of a group.

    Attributes:
      images: test images of each run.
      points, seeds, digests: of the runs, in one order.
    """

    group: str
    ticket: str
    kind: str
    remaining_ratio: float
    natural: Spread
    robust: Spread
    images: int
    attack: str
    precision: str
    hardware: list[str]
    points: list[str]
    seeds: list[int]
    digests: list[str]


def summarise(measured: Sequence[Measured]) -> list[Line]:
    """A line a group and ticket, groups in the order in which they come, tickets by remaining ratio."""
    together: dict[tuple[str, str], list[Measured]] = {}
    for each in measured:
        together.setdefault((each.group, each.record.name), []).append(each)
    groups = list(dict.fromkeys(group for group, _ in together))
    lines = [_line(group, ticket, runs) for (group, ticket), runs in together.items()]
    return sorted(lines, key=lambda line: (groups.index(line.group), line.kind == "dense", line.remaining_ratio))


def _line(group: str, ticket: str, runs: list[Measured]) -> Line:
    records = [run.record for run in runs]
    first = records[0]
    return Line(
        group=group,
        ticket=ticket,
        kind=first.kind,
        remaining_ratio=first.remaining_ratio,
        natural=_spread([r.natural.value for r in records]),
        robust=_spread([r.robust.value for r in records]),
        images=first.robust.n,
        attack=_named(first.attack),
        precision=first.precision,
        hardware=sorted({r.provenance.hardware for r in records}),
        points=[run.point for run in runs],
        seeds=[r.seed for r in records],
        digests=[r.digest for r in records],
    )


def _named(attack: AttackRecord) -> str:
    plural = "s" * (attack.restarts != 1)
    return (
        f"{attack.name}, {attack.norm}, eps {radius(attack.eps)}, {attack.steps} steps of {attack.step_size:.4g}, "
        f"{attack.restarts} start{plural}"
    )


def _spread(values: Sequence[float]) -> Spread:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.fmean(values), deviation, len(values))


def _percent(spread: Spread) -> str:
    """Mean and deviation: 47.8 +- 0.4."""
    told = f"{100 * spread.mean:.1f}"
    return told if spread.deviation is None else f"{told} +- {100 * spread.deviation:.1f}"


def _rows(lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    header = ["runs", "ticket", "natural %", "robust %", "n", "images", "attack"]
    rows = [
        [x.group, x.ticket, _percent(x.natural), _percent(x.robust), str(x.robust.n), f"{x.images:,}", x.attack]
        for x in lines
    ]
    return header, rows


def sweep_text(lines: Sequence[Line]) -> str:
    """The lines for a terminal."""
    return "\n".join([*columns(*_rows(lines), right=True), "", "n runs of other seeds: mean +- standard deviation."])


def write(
    folder: Path, name: str, lines: Sequence[Line], measured: Sequence[Measured], figure: Mapping[str, Any] | None
) -> Path:
    """Write results/sweep.json, .csv and, of a figure, .svg; and report/index.html, whose path is returned."""
    results = folder / "results"
    write_json(results / "sweep.json", {"sweep": name, "lines": [dataclasses.asdict(line) for line in lines]})
    write_text(results / "sweep.csv", _csv(lines))
    pictures = []
    if figure is not None:
        picture = PLOTS[figure["kind"]](lines, figure)
        write_text(results / "sweep.svg", picture)
        caption = "Mean over the runs of a group; bars: standard deviation."
        pictures.append((figure.get("title", name), picture, caption))
    p = measured[0].record.provenance
    hardware = "; ".join(sorted({each for line in lines for each in line.hardware}))
    made = f"rst_jax {p.version} ({p.revision}) on {hardware}. Digests: " + ", ".join(
        f"{m.point} {m.record.name} {m.record.digest[:12]}" for m in measured
    )
    first = measured[0].record
    notes = [
        f"{first.dataset}, {first.model}, {first.precision}; mean and standard deviation over n runs of other seeds.",
        "PGD alone overestimates robustness.",
    ]
    page = folder / "report" / "index.html"
    header, rows = _rows(lines)
    spread = [
        [cell.replace(" +- ", "\N{NO-BREAK SPACE}\N{PLUS-MINUS SIGN}\N{NO-BREAK SPACE}") for cell in r] for r in rows
    ]
    write_text(page, render(f"Sweep: {name}", header, spread, notes, pictures, f"{made}."))
    return page


def _csv(lines: Sequence[Line]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    figures = ("natural_mean", "natural_deviation", "robust_mean", "robust_deviation")
    writer.writerow(["group", "ticket", "remaining_ratio", "n", *figures, "images", "attack", "seeds"])
    for x in lines:
        spreads = [x.natural.mean, x.natural.deviation, x.robust.mean, x.robust.deviation]
        seeds = " ".join(map(str, x.seeds))
        writer.writerow([x.group, x.ticket, x.remaining_ratio, x.robust.n, *spreads, x.images, x.attack, seeds])
    return text.getvalue()


def check_figure(figure: Mapping[str, Any]) -> None:
    """Refuse a FIGURE that no plot shows.

    Raises:
      ValueError: in one sentence.
    """
    if not hasattr(figure, "items") or "kind" not in figure:
        raise ValueError(f"FIGURE: expected {{'kind': {' or '.join(map(repr, PLOTS))}, ...}}; got {figure!r}.")
    choices: dict[str, tuple[str, ...]] = {"kind": tuple(PLOTS), "shows": ("robust", "natural")}
    known = (*choices, "title")
    for name, value in figure.items():
        if name not in known:
            hint = near(str(name), known, f"it may have {', '.join(known)}.")
            raise ValueError(f"FIGURE: there is no {name!r}; {hint}")
        if name in choices and value not in choices[name]:
            hint = near(str(value), choices[name])
            raise ValueError(
                f"FIGURE: {name} must be one of {', '.join(choices[name])}; got {value!r}.{' ' * bool(hint)}{hint}"
            )


def ratio(lines: Sequence[Line], figure: Mapping[str, Any]) -> str:
    """Accuracy ("shows": "robust", the default, or "natural") against remaining ratio, a line a group; as SVG.

    Dashed: the dense networks of a group.
    """
    shown = figure.get("shows", "robust")
    canvas, axes = figure_of(8, 3.6)
    ratios = sorted({line.remaining_ratio for line in lines if line.kind != "dense"})
    for place, group in enumerate(dict.fromkeys(line.group for line in lines)):
        colour = CYCLE[place % len(CYCLE)]
        own = [line for line in lines if line.group == group]
        drawn = [line for line in own if line.kind != "dense"]
        spreads: list[Spread] = [getattr(line, shown) for line in drawn]
        axes.errorbar(
            [100 * line.remaining_ratio for line in drawn],
            [100 * spread.mean for spread in spreads],
            yerr=[100 * (spread.deviation or 0.0) for spread in spreads],
            color=colour,
            marker="o",
            capsize=3,
            label=label(group),
        )
        for line in own:
            if line.kind == "dense":
                axes.axhline(100 * getattr(line, shown).mean, color=colour, linestyle="--", linewidth=1.2)
    axes.set_xscale("log")
    axes.set_xticks([100 * r for r in ratios], [f"{100 * r:g}" for r in ratios])
    axes.minorticks_off()
    axes.set_xlabel("remaining ratio (%)")
    axes.set_ylabel(f"{shown} test accuracy (%)")
    axes.grid(axis="y", color="#e4e8eb")
    axes.legend(frameon=False, loc="lower right")
    return svg(canvas)


PLOTS: dict[str, Callable[[Sequence[Line], Mapping[str, Any]], str]] = {"ratio": ratio}
