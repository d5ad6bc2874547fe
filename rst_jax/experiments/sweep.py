"""Sweeps: many runs of one config file, each an ordinary workdir below the sweep's.

A workdir's lock is the scheduler: the same command on ten machines takes ten free points, looks again at those that
others hold, and ends when all are finished; the point of a machine that dies is free again. Without locks between
machines, `--config.sweep_index` takes one point a machine.
"""

import contextlib
import dataclasses
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rst_jax.config import Config, near
from rst_jax.experiments.draw import draw
from rst_jax.experiments.run import DENSE, Run, name_of
from rst_jax.records import TicketRecord, read_json
from rst_jax.reports import paper
from rst_jax.runtime import preemption
from rst_jax.runtime.files import guarded, write_json
from rst_jax.runtime.mesh import from_main, is_main, on_main
from rst_jax.runtime.progress import Say, make_say
from rst_jax.runtime.text import show
from rst_jax.runtime.work import Failed, at_work
from rst_jax.runtime.workdir import Claim, InUse, dotted, in_use

_LOOK_AGAIN, _RESERVED = 3.0, ("results", "report", "sweep.json")  # seconds between two looks at what others hold
_FINISHED = "finished.json"  # in a point's workdir: the configuration of which all stages are done
_PLACE = ("data_dir", "compilation_cache")  # fields that may differ from machine to machine


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes:
      name: of its workdir below the sweep's.
      varied: the dotted fields that the sweep sets.
      source: an earlier point that must be finished first, or None.
    """

    name: str
    config: Config
    varied: tuple[str, ...]
    source: str | None

    @property
    def group(self) -> str:
        """What it shares with the points that differ from it in seed and remaining ratio alone."""
        values = dotted(self.config.to_dict())
        told = [name for name in self.varied if name not in ("seed", "remaining_ratios")]
        return ", ".join(f"{name}={_plain(values[name])}" for name in told) or "all"


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The points of a config file and where they are drawn; `figure` says which plot shows them."""

    name: str
    workdir: Path
    points: list[Point]
    figure: Mapping[str, Any] | None

    def folder(self, point: Point) -> Path:
        """The point's workdir."""
        return self.workdir / point.name


def expand(
    pairs: Sequence[Any],
    make: Callable[[Mapping[str, Any]], Config],
    typed: frozenset[str] = frozenset(),
    figure: Mapping[str, Any] | None = None,
) -> list[Point]:
    """The points, all of them checked.

    Args:
      pairs: (name, {dotted field: value}) each; the key "source" names an earlier point.
      make: the configuration with such fields.
      typed: fields that the command line sets, which no point may set.
      figure: the file's FIGURE.

    Raises:
      ValueError: what is not right of a point or of the figure, in one sentence.
    """
    points: list[Point] = []
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2 and hasattr(pair[1], "items")):
            raise ValueError(f"sweep(): expected pairs (name, {{dotted field: value}}); got {pair!r}.")
        name, values = pair[0], dict(pair[1])
        _check_name(name, [point.name for point in points])
        source = values.pop("source", None)
        if source is not None and source not in (names := [point.name for point in points]):
            hint = near(str(source), names, "a source comes before the points that need it.")
            raise ValueError(f"sweep(): the source {source!r} of {name!r} is no earlier point; {hint}")
        if both := sorted(typed & values.keys()):
            raise ValueError(f"--config.{both[0]}: the sweep sets it in its points (as of {name!r}); leave it out.")
        try:
            points.append(Point(name, make(values), tuple(values), source))
        except ValueError as error:
            raise ValueError(f"sweep(): point {name!r}: {error}") from error
    if not points:
        raise ValueError("sweep() yields no point.")
    if figure is not None:
        paper.check_figure(figure)
    return points


def _check_name(name: Any, earlier: list[str]) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.+=-]*", name) or name in _RESERVED:
        raise ValueError(f"sweep(): a point's name is one plain word, not {' nor '.join(_RESERVED)}; got {name!r}.")
    if name in earlier:
        raise ValueError(f"sweep(): two points are called {name!r}.")


def take(points: list[Point], index: int | None) -> list[Point]:
    """All of them, or the one of an index counted from 0.

    Raises:
      ValueError: there is no such point.
    """
    if index is None:
        return points
    if not 0 <= index < len(points):
        raise ValueError(f"--config.sweep_index must lie in 0 to {len(points) - 1}, for as many points; got {index}.")
    return [points[index]]


def work(sweep: Sweep, taken: list[Point]) -> None:
    """Draw what is not finished of `taken`, and gather the table; points that others hold are waited for.

    A point that fails is told and left; the others are drawn.

    Raises:
      ValueError: a point cannot be run as it is; nothing was written.
      Preempted: the process was asked to stop.
      Failed: points failed; they are named.
    """
    check(sweep, taken)
    with _held(sweep):
        pass
    with guarded(sweep.workdir, lambda: _see(sweep)):
        _work(sweep, taken, make_say(is_main()))


def _see(sweep: Sweep) -> None:
    if is_main() and not (sweep.workdir / "sweep.json").exists():
        raise Failed(f"workdir {sweep.workdir} was removed while this process worked in it.")


def _work(sweep: Sweep, taken: list[Point], say: Say) -> None:
    by_name = {point.name: point for point in sweep.points}
    failed: list[str] = []
    told = ""
    while left := [p for p in taken if p.name not in failed and not _finished(sweep, p)]:
        moved = False
        for point in left:
            if preemption.asked():
                raise preemption.Preempted
            if _finished(sweep, point):  # by another process, just now
                moved = True
            elif point.source in failed:
                say(f"{point.name}: not drawn, since {point.source} failed")
                failed.append(point.name)
            elif point.source is None or _finished(sweep, by_name[point.source]):
                try:
                    moved |= _draw(sweep, point, say)
                except Failed as error:
                    if jax.process_count() > 1:  # the others may wait for this one
                        raise
                    say(f"{point.name}: failed: {error}")
                    failed.append(point.name)
        waited = {p.source if p.source and not _finished(sweep, by_name[p.source]) else p.name for p in left}
        if not moved and (waits := ", ".join(p.name for p in sweep.points if p.name in waited - set(failed))):
            if waits != told:
                say(f"waiting for other processes to finish {waits}")
                told = waits
            time.sleep(_LOOK_AGAIN)
    with _held(sweep), at_work():
        gather(sweep, say)
    if failed:
        raise Failed(f"{len(failed)} of {len(taken)} points failed: {', '.join(failed)}; what they said stands above.")


def check(sweep: Sweep, taken: list[Point]) -> None:
    """Refuse what cannot be run, before any work: networks, data, ratios, and workdirs of another question."""
    seen = set()
    for point in taken:
        folder = sweep.folder(point)
        begun = _told((folder / "config.json").exists())
        on_main(Claim(folder, "config.json", {}, f"workdir {folder}", "run", "--workdir").refuse_foreign)
        parts = dataclasses.replace(point.config, seed=0, attack=Config.attack, optimizer=Config.optimizer)
        if (parts in seen and not begun) or _finished(sweep, point):
            continue
        seen.add(parts)
        try:
            run = Run(point.config, folder, make_say(False))
            run.check()
            if begun or not run.claim.begin:
                with contextlib.ExitStack() as held:
                    _taken(run.claim, held)
        except ValueError as error:
            raise ValueError(f"point {point.name!r}: {error}") from error


@contextlib.contextmanager
def _held(sweep: Sweep) -> Iterator[None]:
    """Hold the workdir, marked as this sweep's, for a moment; several processes may come at once."""
    called = f"workdir {sweep.workdir}"
    claim = Claim(sweep.workdir, "sweep.json", {"sweep": sweep.name}, called, holds="sweep", instead="--workdir")
    while True:
        with contextlib.ExitStack() as held:
            if _taken(claim, held):
                yield
                return
        time.sleep(0.1)


def _draw(sweep: Sweep, point: Point, say: Say) -> bool:
    """Draw a point, unless another process holds it; whether it was free."""
    folder = sweep.folder(point)
    if _told(in_use(folder)):  # asked first, since a run's parts take their time
        return False
    run = Run(point.config, folder, lambda text: say(f"{point.name}: {text}"))
    with contextlib.ExitStack() as held:
        if not _taken(run.claim, held):
            return False
        if not _finished(sweep, point):
            with at_work():
                draw(run)
                if is_main():
                    write_json(folder / _FINISHED, _asked(point))
    return True


def _taken(claim: Claim, held: contextlib.ExitStack) -> bool:
    """Hold a folder, unless another process does; what refuses it otherwise is raised."""
    try:
        held.enter_context(claim.held())
    except (ValueError, OSError) as error:
        if _told(isinstance(error, InUse)):
            return False
        raise
    return True


def _finished(sweep: Sweep, point: Point) -> bool:
    """Whether all stages are done of this very configuration (fields of later versions taken at their defaults)."""
    same = False
    with contextlib.suppress(ValueError, TypeError):
        found = read_json(sweep.folder(point) / _FINISHED, dict[str, Any])
        usual = json.loads(json.dumps(dotted(Config().to_dict())))
        same = {**usual, **found} == {**usual, **_asked(point)}
    return _told(same)


def _asked(point: Point) -> dict[str, Any]:
    """The configuration, dotted, as JSON has it."""
    plain = json.loads(json.dumps(dotted(point.config.to_dict())))
    return {name: value for name, value in plain.items() if name not in _PLACE}


def _told(flag: bool) -> bool:
    """What the first process sees, since files may appear to others later."""
    return bool(from_main(np.asarray(flag)))


def _plain(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "+".join(map(_plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def gather(sweep: Sweep, say: Say) -> None:
    """Write results/sweep.json, sweep.csv, sweep.svg and report/index.html of what is finished, and print the table.

    Of several processes the first does so. Runs that differ in their seed alone are one line.
    """
    finished = [point for point in sweep.points if _finished(sweep, point)]
    if not is_main():
        return
    measured = []
    for point in finished:
        c, results = point.config, sweep.folder(point) / "results"
        names = [name_of(ratio) for ratio in sorted(c.remaining_ratios)] + [DENSE] * c.dense.train
        there = [path for name in names if (path := results / f"{name}.json").exists()]
        measured += [paper.Measured(point.name, point.group, read_json(path, TicketRecord)) for path in there]
    say(f"{len(finished)} of {len(sweep.points)} points are finished")
    if measured:
        lines = paper.summarise(measured)
        page = paper.write(sweep.workdir, sweep.name, lines, measured, sweep.figure)
        show(f"\n{paper.sweep_text(lines)}\n\nreport: {page}")
