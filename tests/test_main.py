"""The command as a person types it, in processes of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rst_jax import main, records
from rst_jax.main import run_command
from rst_jax.runtime import preemption, work
from rst_jax.tickets.file import load_ticket
from rst_jax.tickets.r2s import load_r2s

ROOT = Path(__file__).parent.parent
TINY = [
    "--config=configs/digits.py",
    "--config.remaining_ratios=(0.3,0.6)",
    "--config.epochs=3",
    "--config.dense.epochs=1",
    "--config.evaluate.steps=3",
    "--config.evaluate.every_epochs=1",
    "--config.checkpoint_every_epochs=1",
]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(cache)}


def command(workdir, *more):
    return [sys.executable, "-m", "rst_jax.main", *TINY, f"--workdir={workdir}", *more]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, environment):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    done = subprocess.run(command(workdir), env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return workdir, done.stdout, done.stderr


@pytest.mark.slow
def test_a_draw_leaves_everything_it_promises(finished):
    workdir, out, err = finished
    names = ["ratio-0.3", "ratio-0.6", "dense"]
    rows = [line for line in out.splitlines() if line.startswith(("ticket, ratio", "dense, adv"))]
    assert len(rows) == 3
    assert "it/s" not in err
    assert sum("% under attack; " in line for line in out.splitlines()) == 3 + 3 + 1  # a line an epoch
    assert "Traceback" not in err
    for name in names:
        ticket = load_ticket(workdir / "tickets" / f"{name}.ticket")
        record = records.read_json(workdir / "results" / f"{name}.json", records.TicketRecord)
        assert record.digest == ticket.digest
        assert record.natural.n == 360
        assert record.violations == 0
        assert record.weights_kept == ticket.weight_counts[0]
        for kind in ("latest", "best"):
            assert list((workdir / "checkpoints" / name / kind).iterdir())
    transfer = records.read_json(workdir / "results" / "transfer.json", records.TransferRecord)
    assert np.shape(transfer.robust) == (2, 2)
    for i, name in enumerate(names[:2]):
        record = records.read_json(workdir / "results" / f"{name}.json", records.TicketRecord)
        assert transfer.robust[i][i] == record.robust.value
    r2s = records.read_json(workdir / "results" / "r2s.json", records.R2SRecord)
    assert r2s.transfer_only == pytest.approx(np.mean(transfer.robust))
    assert r2s.worst_of_pool <= r2s.transfer_only
    assert len(load_r2s(workdir / "checkpoints" / "tickets").tickets) == 2
    config = json.loads((workdir / "config.json").read_text())
    assert config["config"]["epochs"] == 3
    assert config["provenance"]["libraries"]["jax"]
    steps = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert {row["run"] for row in steps} == set(names)
    assert all(row["loss"] > 0 for row in steps if "loss" in row)


@pytest.mark.slow
def test_the_report_is_one_file_with_every_plot(finished):
    page = (finished[0] / "report" / "index.html").read_text()
    assert page.count("<svg") == 4
    assert page.count('<img alt="clean and adversarial images" src="data:image/png;base64,') == 1
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    assert "<script" not in page
    for words in ("Accuracy against remaining ratio", "Transfer", "R2S", "Training", "Adversarial images", "0.12"):
        assert words in page


@pytest.mark.slow
def test_a_figure_is_what_the_ticket_does(finished):
    """The recorded natural accuracy, counted again through the ticket file and the public interface."""
    from sklearn.datasets import load_digits

    workdir = finished[0]
    bunch = load_digits()
    rows = np.arange(0, len(bunch.target), 5)
    images = (bunch.images[rows, ..., None] / 16).astype(np.float32)
    for name in ("ratio-0.3", "dense"):
        ticket = load_ticket(workdir / "tickets" / f"{name}.ticket")
        record = records.read_json(workdir / "results" / f"{name}.json", records.TicketRecord)
        natural = np.mean(np.argmax(np.asarray(ticket(images)), -1) == bunch.target[rows])
        assert natural == pytest.approx(record.natural.value, abs=1e-9)


def final_state(workdir, name):
    """Every array of the latest checkpoint, by its path."""
    import orbax.checkpoint as ocp

    folder = max((workdir / "checkpoints" / name / "latest").iterdir(), key=lambda path: int(path.name))
    tree = ocp.StandardCheckpointer().restore(folder / "state")
    import jax

    return int(folder.name), {
        jax.tree_util.keystr(p): np.asarray(x) for p, x in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_killed_and_started_again_it_ends_bit_identical(finished, environment, tmp_path):
    """SIGKILL at moments spread over the run, until it comes through; then every array is compared."""
    whole, workdir = finished[0], tmp_path / "killed"
    kills, delays = 0, [2.0, 0.0, 0.3, 0.9, 0.1, 0.6, 1.2, 0.4]
    while kills < 8:
        process = subprocess.Popen(
            command(workdir), env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        before = tell(workdir)
        deadline = time.monotonic() + 120
        while process.poll() is None and tell(workdir) == before and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(delays[kills])
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
    done = subprocess.run(command(workdir), env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert kills >= 3
    for name in ("ratio-0.3", "ratio-0.6", "dense"):
        (step_a, a), (step_b, b) = final_state(whole, name), final_state(workdir, name)
        assert step_a == step_b
        assert a.keys() == b.keys()
        for path in a:
            np.testing.assert_array_equal(a[path], b[path], err_msg=path)
        tickets = [load_ticket(w / "tickets" / f"{name}.ticket") for w in (whole, workdir)]
        assert tickets[0].digest == tickets[1].digest
        assert tickets[0].origin == tickets[1].origin

    def rows(w):
        return [json.loads(line) for line in (w / "metrics.jsonl").read_text().splitlines()]

    assert rows(whole) == rows(workdir)


def tell(workdir):
    """How far a run is: its rows of metrics and its finished tickets."""
    path = workdir / "metrics.jsonl"
    return (path.read_text().count("\n") if path.exists() else 0, len(list(workdir.glob("tickets/*.ticket"))))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_sigterm_saves_and_the_run_goes_on_as_never_stopped(finished, environment, tmp_path):
    """Again and again, a moment after each new line of metrics; in the end every array and line is the same."""
    whole, workdir = finished[0], tmp_path / "stopped"
    codes = []
    while len(codes) < 30:
        process = subprocess.Popen(
            command(workdir), env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        before = tell(workdir)
        while process.poll() is None and tell(workdir) == before:
            time.sleep(0.02)
        if len(codes) < 4:
            process.send_signal(signal.SIGTERM)
        out = process.communicate()[0]
        codes.append(process.returncode)
        if process.returncode != 75:
            break
        assert "stopped by SIGTERM; the same command goes on from here" in out
    assert codes.count(75) >= 3
    assert codes[-1] == 0, out
    for name in ("ratio-0.3", "ratio-0.6", "dense"):
        (step_a, a), (step_b, b) = final_state(whole, name), final_state(workdir, name)
        assert step_a == step_b
        for key, array in a.items():
            np.testing.assert_array_equal(b[key], array, err_msg=key)
    assert (whole / "metrics.jsonl").read_text() == (workdir / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_its_minutes_over_it_stops_saved_and_goes_on(environment, tmp_path):
    """Without time it only stops what it began; then a few seconds after the first step; then to the end."""
    few = ["--config.remaining_ratios=(0.3,)", "--config.dense.train=False", "--config.log_every_steps=1"]
    for minutes, code in (("0", 75), ("5", 0)):
        done = subprocess.run(
            command(tmp_path / "w", *few, "--minutes", minutes),
            env=environment, cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        assert ("stopped as the 0 minutes end; the same command goes on from here." in done.stderr) == (code == 75)
    assert "ratio-0.3: going on after epoch 0.05 of 3" in done.stdout


@pytest.mark.slow
def test_what_is_finished_is_not_searched_again(finished, environment):
    workdir = finished[0]
    kept = [workdir / "results" / "gallery.npz", *(workdir / "checkpoints" / "tickets").rglob("*")]
    kept += [*(workdir / "checkpoints").rglob("*/latest/*"), *(workdir / "results").glob("*.json")]
    before = {p: p.stat().st_mtime_ns for p in kept}
    lines = (workdir / "metrics.jsonl").read_bytes()
    done = subprocess.run(command(workdir), env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.count("already drawn") == 3
    assert {p: p.stat().st_mtime_ns for p in kept} == before
    assert (workdir / "metrics.jsonl").read_bytes() == lines
    assert table_of(done.stdout) == table_of(finished[1])


def table_of(out):
    return out[out.index("network ") : out.index("report:")]


@pytest.mark.slow
def test_a_second_process_on_the_workdir_is_refused(finished, environment):
    import fcntl

    with (finished[0] / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(
            command(finished[0]), env=environment, cwd=ROOT, capture_output=True, text=True, check=False
        )
    assert done.returncode == 2
    assert "in use by another process" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_another_configuration_on_the_workdir_is_refused(finished, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    before = (finished[0] / "config.json").read_bytes()
    code = run_command(["main", *TINY, f"--workdir={finished[0]}", "--config.epochs=4", "--config.compilation_cache="])
    assert code == 2
    assert "epochs was 3, now 4" in capsys.readouterr().err
    assert (finished[0] / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "expected --config=FILE"),
        (["--config=configs/digit.py"], "did you mean 'digits.py'?"),
        (["--config=configs/digits.py", "--config.remaining_ratio=(0.1,)"], "did you mean 'remaining_ratios'?"),
        (["--config=configs/digits.py", "--config.threat.eps=8"], "threat.eps must be in [0, 1]; got 8.0"),
        (
            ["--config=configs/digits.py", "--config.remaining_ratios=(0.1,1.5)"],
            "ratios must be at most 1; got 1.5",
        ),
        (["--config=configs/digits.py", "--config.epochs=many"], "epochs"),
        (["--config=configs/digits.py", "--workdri=x"], "no option --workdri; did you mean '--workdir'?"),
        (["draw"], "expected --config=FILE"),
        (["evaluat"], "no word 'evaluat'; did you mean 'evaluate'?"),
        (["--config=configs/digits.py:smoke"], "defines no smoke()"),
        (["--config=configs/digits_patterns.py:smok"], "has no variant 'smok'; did you mean 'smoke'?"),
        (["--config=configs/digits.py", "--config.task=search"], "did you mean 'stages'?"),
        (["--config=configs/digits.py", "--config.stages=evalute"], "did you mean 'evaluate'?"),
        (["--config=configs/digits.py", "--config.threat=8/255"], "'threat' is a section"),
        (["--config=configs/digits.py", "--config.threat.eps", "8/0"], "a fraction such as 8/255; got '8/0'"),
        (["--config=configs/digits.py", "--config.flip=maybe"], "expected true or false; got 'maybe'"),
        (["--config=configs/digits.py", "--config.epochs"], "--config.epochs: expected one argument"),
        (["--config=configs/digits.py", "--minutes=soon"], "--minutes: expected a number"),
        (["--config=configs/digits.py", "--minutes", "-1"], "--minutes must be at least 0; got -1"),
        (["--config=configs/digits.py", "--config.sweep_index=0"], "defines no sweep()"),
        (["--config=configs/digits_patterns.py", "--config.sweep_index=6"], "must lie in 0 to 5"),
        (["--config=configs/digits_patterns.py", "--config.sweep_index=x"], "expected a whole number; got 'x'"),
        (["--config=configs/digits_patterns.py", "--config.sweep_idx=1"], "did you mean 'sweep_index'?"),
        (["--config=configs/digits_patterns.py", "--config.pattern=row"], "the sweep sets it in its points"),
        (["--config=configs/digits_patterns.py", "--config.model=resnet17"], "point 'element-0': model must be one of"),
        (["--config=configs/digits_patterns.py", "--config.holdout=-1"], "point 'element-0': config: holdout"),
        (["--config=configs/digits_patterns.py", "--config.stages=report"], "holds no run yet"),
        (["--config=configs/digits.py", "extra"], "'extra'"),
        (["--config=configs/digits.py", "--config.model=resnet17"], "resnet18"),
        (["--config=configs/digits.py", "--config.weight_init=zeros"], "signed_kaiming_constant"),
        (["--config=configs/cifar10_r18.py", "--config.data_dir=nowhere"], "not prepared in data_dir nowhere"),
        (["--config=configs/cifar10_r18.py", "--config.dataset=npz"], "data_path"),
        (["--config=configs/digits.py", "--config.model=conv8"], "too small to halve 4 times"),
        (["--config=configs/digits.py", "--config.seed=9876543210123"], "seed must be below 2**32"),
        (
            ["--config=configs/digits.py", "--config.train_examples=0", "--config.batch_size=7"],
            "multiple of the 4 devices",
        ),
        (["--config=configs/digits.py", "--coordinator=localhost:1"], "--num_processes"),
        (["--config=configs/digits.py", "--num_processes=2", "--process_id=0"], "need --coordinator"),
        (["--config=configs/digits.py", "--coordinator=localhost:1", "--num_processes=0"], "must be at least 1"),
        (
            ["--config=configs/digits.py", "--coordinator=localhost:1", "--num_processes=2", "--process_id=2"],
            "--process_id must lie in 0 to --num_processes - 1; got 2",
        ),
        (["--config=configs/digits.py", "--workdir", "--config.epochs=1"], "--workdir: expected one argument"),
        (["--config=configs/digits.py", "--config.threat.eps=1/0"], "a fraction such as 8/255; got '1/0'"),
        (
            ["--config=configs/digits.py", f"--config.epochs={'9' * 26}"],
            "epochs must be at most 2147483647",
        ),
        (["--config=configs/digits.py", "--config.threat.norm=l2", "--config.evaluate.step_size=-.3"], "at least 0"),
        (
            ["--config=configs/digits.py", "--config.threat.norm=l2", "--config.threat.eps=9"],
            "eps must be at most 8",
        ),
        (["--config=configs/digits.py", "--config.optimizer.boundaries=(-1,)"], "boundaries must be at least 0"),
        (["--config=configs/digits.py", "--config.stages=search,evaluate"], "dense not drawn yet"),
        (["--config=configs/digits.py", "--config.dataset=digts"], "Did you mean 'digits'?"),
        (["--config="], "expected --config=FILE"),
        (["--config=configs/digits.py", "--config.compute_dtype=float64"], "JAX_ENABLE_X64"),
    ],
)
def test_what_is_not_right_ends_with_code_2_a_sentence_and_nothing_written(
    arguments, words, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(ROOT)
    workdir = tmp_path / "w"
    code = run_command(
        ["main", *arguments, f"--workdir={workdir}", *(["--config.compilation_cache="] if arguments else [])]
    )
    captured = capsys.readouterr()
    assert code == 2, captured
    assert words in captured.err
    assert captured.err.startswith("rst_jax: ")
    assert "Traceback" not in captured.err
    assert not workdir.exists()


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "thesis.tex").write_text("mine")
    code = run_command(["main", *TINY, f"--workdir={tmp_path}", "--config.compilation_cache="])
    assert code == 2
    assert "holds other files" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_part_without_what_it_needs_says_so_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    for stage in ("evaluate", "report"):
        workdir = tmp_path / stage
        code = run_command(
            ["main", *TINY, f"--workdir={workdir}", f"--config.stages=('{stage}',)", "--config.compilation_cache="]
        )
        assert code == 2
        assert "holds no run yet" in capsys.readouterr().err
        assert not workdir.exists()


def test_help_lists_the_words(capsys):
    assert run_command(["main", "--help"]) == 0
    told = capsys.readouterr().out
    assert "usage: python -m rst_jax.main --config=" in told
    for word in ("draw", "evaluate", "show", "plan"):
        assert f"\n  {word} " in told


@pytest.mark.parametrize(
    ("raised", "code", "words"),
    [
        (preemption.Preempted(), 75, "stopped by SIGTERM; the same command goes on from here."),
        (work.Lost("another process was lost"), 75, "another process was lost"),
        (work.Failed("no space left"), 1, "no space left"),
        (KeyboardInterrupt(), 1, "stopped; the same command goes on from what was last saved."),
        (ValueError("expected this"), 2, "expected this"),
        (PermissionError("not yours"), 2, "not yours"),
    ],
)
def test_how_it_ends_is_told_by_a_code_and_a_sentence(raised, code, words, capsys, monkeypatch):
    def word(arguments):
        raise raised

    monkeypatch.setitem(main.WORDS, "show", ("", word))
    assert run_command(["main", "show"]) == code
    assert capsys.readouterr().err == f"rst_jax: {words}\n"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:overflow")
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    for field, layer in (("optimizer", "scores"), ("dense", "params")):
        workdir = tmp_path / field
        more = ["--config.remaining_ratios=(0.3,)", "--config.epochs=1", f"--config.{field}.learning_rate=1e38"]
        tiny = [a for a in TINY if not a.startswith("--config.remaining_ratios")]
        code = run_command(["main", *tiny, *more, f"--workdir={workdir}", "--config.compilation_cache="])
        error = capsys.readouterr().err
        assert code == 1, error
        assert "in step 10" in error
        assert f"['{layer}']['" in error
        assert "learning_rate" in error
        assert not (workdir / "tickets" / ("ratio-0.3.ticket" if layer == "scores" else "dense.ticket")).exists()


@pytest.mark.slow
def test_a_draw_can_end_with_the_whole_card(environment, tmp_path):
    workdir = tmp_path / "carded"
    few = ["--config.remaining_ratios=(0.5,)", "--config.dense.train=False", "--config.evaluate.examples=6"]
    done = subprocess.run(
        command(workdir, *few), env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Evaluation card" not in (workdir / "report" / "index.html").read_text()
    more = [*few, "--config.evaluate.card=full", "--config.stages=('evaluate','cards','report')"]
    done = subprocess.run(
        command(workdir, *more), env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    card = records.read_json(workdir / "results" / "cards" / "ratio-0.5-full" / "card.json", records.CardRecord)
    names = "FGSM FGSM-RS PGD-20-eps/4 PGD-100x10 CW-Linf MIM AutoAttack AutoAttack-L2 CW-L2 Square noise"
    assert [row.name.replace(" ", "-") for row in card.rows] == names.split()
    rows = {row.name: row for row in card.rows}
    assert rows["AutoAttack"].robust.value <= rows["PGD-20 eps/4"].robust.value <= card.clean.value
    assert rows["CW-L2"].median_distance > 0
    assert card.n == 6
    page = (workdir / "report" / "index.html").read_text()
    assert "Evaluation card: ratio-0.5 on digits" in page
    assert "Verdict: " in page
