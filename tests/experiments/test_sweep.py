"""Sweeps: points from data, who draws which, and what is gathered. The slow test is the command on real digits."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rst_jax import config as config_lib
from rst_jax.cli.config_file import changed, load
from rst_jax.experiments import sweep
from rst_jax.runtime import preemption
from rst_jax.runtime.work import Failed
from rst_jax.runtime.workdir import Claim, in_use

ROOT = Path(__file__).parents[2]
FILE = "configs/digits_patterns.py"


def make(values):
    return config_lib.from_dict(changed({"dataset": "digits"}, values))


def test_the_points_of_a_file():
    file = load(str(ROOT / FILE), {"epochs": 3})
    points = sweep.expand(file.points, file.config, file.typed, file.figure)
    assert [point.name for point in points] == [f"{p}-{s}" for p in ("element", "row") for s in range(3)]
    assert [(point.config.pattern, point.config.seed, point.config.epochs) for point in points[2:4]] == [
        ("element", 2, 3),
        ("row", 0, 3),
    ]
    assert [point.group for point in points[::3]] == ["pattern=element", "pattern=row"]
    assert sweep.take(points, 3) == [points[3]]
    assert sweep.take(points, None) == points


def test_a_group_is_what_differs_beside_seed_and_ratio():
    values = {"threat.eps": 0.1, "seed": 2, "remaining_ratios": (0.1,), "optimizer.boundaries": (3, 5)}
    (point,) = sweep.expand([("a", values)], make)
    assert point.group == "threat.eps=0.1, optimizer.boundaries=3+5"
    assert sweep.expand([("a", {"seed": 1})], make)[0].group == "all"


@pytest.mark.parametrize("name", ["optimizer.boundaries", "stages", "threat.eps", "bn_sync"])
def test_a_point_that_an_earlier_version_finished_stays_finished(name, tmp_path):
    """Each field in turn is one that a later version has added, at its default."""
    points = sweep.expand([("a", {})], make)
    whole = sweep.Sweep("s", tmp_path, points, None)
    asked = sweep._asked(points[0])
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "finished.json").write_text(json.dumps({n: v for n, v in asked.items() if n != name}))
    assert sweep._finished(whole, points[0])
    (tmp_path / "a" / "finished.json").write_text(json.dumps(asked | {"epochs": 7}))
    assert not sweep._finished(whole, points[0])


def test_a_folder_of_something_else_below_the_sweeps_is_found_before_any_work(tmp_path):
    small = {"model": "conv2", "holdout": 100}
    points = sweep.expand([("a", small), ("b", {**small, "seed": 1})], make)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="b holds other files and no run"):
        sweep.check(sweep.Sweep("s", tmp_path, points, None), points)
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ([], "yields no point"),
        (["a"], "expected pairs (name, {dotted field: value}); got 'a'"),
        ([("a", 3)], "expected pairs"),
        ([("a/b", {})], "one plain word"),
        ([("..", {})], "one plain word"),
        ([("results", {})], "one plain word"),
        ([(3, {})], "one plain word"),
        ([("a", {}), ("a", {"seed": 1})], "two points are called 'a'"),
        ([("a", {}), ("b", {"sede": 1})], "point 'b': config: there is no field 'sede'; did you mean 'seed'?"),
        ([("a", {}), ("b", {"threat.eps": 8})], "point 'b': config: threat.eps must be in [0, 1]"),
        ([("a", {}), ("b", {"threat": 8})], "point 'b': config: 'threat' is a section"),
        (
            [("first", {}), ("b", {"source": "frist"})],
            "'frist' of 'b' is no earlier point; did you mean 'first'?",
        ),
        ([("a", {"source": "b"}), ("b", {})], "source 'b' of 'a' is no earlier point"),
        ([("a", {"epochs": 3})], "--config.epochs: the sweep sets it in its points"),
    ],
)
def test_every_typo_of_every_point_is_told_in_a_sentence(pairs, words):
    with pytest.raises(ValueError) as error:
        sweep.expand(pairs, make, frozenset({"epochs"}))
    assert words in str(error.value)


def test_a_wrong_figure_is_refused_with_the_points():
    with pytest.raises(ValueError, match="FIGURE: kind must be one of ratio; got 'rate'"):
        sweep.expand([("a", {})], make, figure={"kind": "rate"})


class StandIn:
    """A run that takes no time: the real claim, and nothing to draw."""

    def __init__(self, config, workdir, say):
        self.config, self.workdir, self.say = config, workdir, say
        self.claim = Claim(workdir, "config.json", config.to_dict(), f"workdir {workdir}", "run", "--workdir")

    def check(self):
        if self.config.model == "none":
            raise ValueError("model must be one that exists.")


@pytest.fixture
def drawn(monkeypatch):
    """Names of the points in the order in which they are drawn; a seed of 13 fails."""
    names = []

    def draw(run):
        if run.config.seed == 13:
            raise FloatingPointError("the loss is nan")
        names.append(run.workdir.name)

    monkeypatch.setattr(sweep, "Run", StandIn)
    monkeypatch.setattr(sweep, "draw", draw)
    monkeypatch.setattr(sweep, "_LOOK_AGAIN", 0.01)
    return names


def sweep_of(tmp_path, *pairs):
    return sweep.Sweep("mine", tmp_path / "w", sweep.expand(pairs, make), None)


def test_what_is_finished_is_not_drawn_again_unless_it_is_asked_for_otherwise(tmp_path, drawn):
    pairs = [("a", {}), ("b", {"seed": 1})]
    made = sweep_of(tmp_path, *pairs)
    sweep.work(made, sweep.take(made.points, 1))
    assert drawn == ["b"]
    sweep.work(made, made.points)
    assert drawn == ["b", "a"]
    marker = made.workdir / "a" / "finished.json"
    kept = json.loads(marker.read_text())
    del kept["label_smoothing"]  # as of a version without the field
    marker.write_text(json.dumps(kept))
    sweep.work(made, made.points)
    assert drawn == ["b", "a"]
    marker.write_text(json.dumps(kept)[:-9])  # cut off
    sweep.work(made, made.points)
    assert drawn == ["b", "a", "a"]


def test_a_point_waits_for_its_source_which_another_process_draws(tmp_path, drawn, capsys, monkeypatch):
    made = sweep_of(tmp_path, ("a", {}), ("b", {"seed": 1, "source": "a"}), ("c", {"seed": 2}))
    source, looks = StandIn(made.points[0].config, made.workdir / "a", None), []
    other = contextlib.ExitStack()
    other.enter_context(source.claim.held())
    assert in_use(made.workdir / "a")

    def look(seconds):
        looks.append(list(drawn))
        if len(looks) == 2:  # the other process ends, and has finished
            (made.workdir / "a" / "finished.json").write_text(json.dumps(sweep._asked(made.points[0])))
            other.close()

    monkeypatch.setattr(sweep.time, "sleep", look)
    (made.workdir / "sweep.json").write_text('{"sweep": "mine"}')
    sweep.work(made, made.points)
    assert looks == [["c"], ["c"]]
    assert drawn == ["c", "b"]
    assert capsys.readouterr().out.count("waiting for other processes to finish a\n") == 1


def test_a_point_of_a_process_that_died_is_taken_over(tmp_path, drawn, monkeypatch):
    made = sweep_of(tmp_path, ("a", {}))
    other = contextlib.ExitStack()
    other.enter_context(StandIn(made.points[0].config, made.workdir / "a", None).claim.held())
    (made.workdir / "sweep.json").write_text('{"sweep": "mine"}')
    monkeypatch.setattr(sweep.time, "sleep", lambda seconds: other.close())
    sweep.work(made, made.points)
    assert drawn == ["a"]


def test_a_point_that_fails_is_named_and_the_others_are_drawn(tmp_path, drawn, capsys):
    made = sweep_of(
        tmp_path, ("a", {"seed": 13}), ("b", {"source": "a"}), ("c", {"seed": 2}), ("d", {"seed": 3, "source": "c"})
    )
    with pytest.raises(Failed, match="2 of 4 points failed: a, b"):
        sweep.work(made, made.points)
    assert drawn == ["c", "d"]
    told = capsys.readouterr().out
    assert "a: failed: the loss is nan" in told
    assert "b: not drawn, since a failed" in told
    assert "2 of 4 points are finished" in told


def test_a_sweep_that_is_removed_is_not_made_again(tmp_path, drawn, monkeypatch):
    made = sweep_of(tmp_path, ("a", {}), ("b", {"seed": 1}))
    monkeypatch.setattr(sweep, "draw", lambda run: shutil.rmtree(made.workdir))
    with pytest.raises(Failed, match="was removed while"):
        sweep.work(made, made.points)
    assert not made.workdir.exists()


def test_asked_to_stop_it_stops_between_points_and_while_it_waits(tmp_path, drawn, monkeypatch):
    made = sweep_of(tmp_path, ("a", {}), ("b", {"seed": 1}))
    monkeypatch.setattr(preemption, "asked", lambda: drawn == ["a"])
    with pytest.raises(preemption.Preempted):
        sweep.work(made, made.points)
    assert drawn == ["a"]


def test_what_cannot_be_run_is_refused_before_anything_is_written(tmp_path, drawn):
    made = sweep_of(tmp_path, ("a", {}), ("b", {"model": "none"}))
    with pytest.raises(ValueError, match="point 'b': model must be one that exists"):
        sweep.work(made, made.points)
    assert not made.workdir.exists()
    # A point's workdir of another question, and a folder of something else.
    first = sweep_of(tmp_path, ("a", {}))
    sweep.work(first, first.points)
    other = sweep_of(tmp_path, ("c", {}), ("a", {"seed": 5}))
    with pytest.raises(ValueError, match=r"point 'a': workdir .* belongs to another run: seed was 0, now 5"):
        sweep.work(other, other.points)
    assert not (made.workdir / "c").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    foreign = sweep.Sweep("mine", tmp_path / "mine", first.points, None)
    with pytest.raises(ValueError, match="holds other files and no sweep"):
        sweep.work(foreign, foreign.points)
    renamed = sweep.Sweep("yours", first.workdir, sweep_of(tmp_path, ("d", {})).points, None)
    with pytest.raises(ValueError, match="belongs to another sweep: sweep was mine, now yours"):
        sweep.work(renamed, renamed.points)
    assert drawn == ["a"]


# The command.

NAMES = [f"{pattern}-{seed}" for pattern in ("element", "row") for seed in range(3)]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(cache)}

    def begin(workdir):
        command = [sys.executable, "-m", "rst_jax.main", f"--config={FILE}:smoke", f"--workdir={workdir}"]
        return subprocess.Popen(
            command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    return begin


def ended(*processes):
    outs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outs
    return outs


def drawn_in(out):
    """The points of which an output says that a ticket was drawn."""
    return [name for name in NAMES for line in out.splitlines() if f"{name}: ratio-0.3: " in line and "weights" in line]


def gathered(workdir):
    return [(workdir / "results" / f"sweep.{kind}").read_text() for kind in ("csv", "json", "svg")]


@pytest.mark.slow
def test_a_sweep_killed_or_shared_gathers_what_an_undisturbed_one_does(start, tmp_path):
    whole, killed, shared = (tmp_path / name for name in ("whole", "killed", "shared"))
    (out,) = ended(start(whole))
    assert drawn_in(out) == NAMES
    assert "6 of 6 points are finished" in out
    rows = [line.split(",") for line in gathered(whole)[0].splitlines()]
    assert [row[:4] for row in rows[1:]] == [[f"pattern={p}", "ratio-0.3", "0.3", "3"] for p in ("element", "row")]
    assert (whole / "report" / "index.html").read_text().count("<svg") == 1

    # SIGKILL within the fourth point; SIGTERM after the next; then to the end.
    process = start(killed)
    while process.poll() is None and not (killed / NAMES[3] / "metrics.jsonl").exists():
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (killed / NAMES[3] / "finished.json").exists()
    process = start(killed)
    while process.poll() is None and not (killed / NAMES[3] / "finished.json").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out = process.communicate()[0]
    assert process.returncode == 75, out
    assert "stopped by SIGTERM; the same command goes on from here." in out
    (out,) = ended(start(killed))
    assert set(drawn_in(out)) == set(NAMES[4:])
    assert gathered(killed) == gathered(whole)

    outs = ended(start(shared), start(shared))
    assert sorted(name for out in outs for name in drawn_in(out)) == NAMES
    assert gathered(shared) == gathered(whole)
