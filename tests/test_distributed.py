"""Real processes over jax.distributed on the CPU, against one process of as many devices."""

import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from rst_jax.reports.card import load_card
from rst_jax.runtime.files import read_arrays, read_lines
from rst_jax.tickets.file import load_ticket

ROOT = Path(__file__).parent.parent
TINY = [
    "--config=configs/digits.py",
    "--config.remaining_ratios=(0.3,)",
    "--config.dense.train=False",
    "--config.epochs=1",
    "--config.train_examples=256",
    "--config.evaluate.steps=2",
    "--config.evaluate.examples=61",
]
# Twenty steps without an evaluation between them; what they leave is the checkpoint.
TWENTY = [*TINY, "--config.train_examples=1280", "--config.stages=search", "--config.log_every_steps=5"]


def start(workdir, devices, *more, options=TINY):
    environment = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(workdir.parent.parent / "cache"),
    }
    command = [sys.executable, "-m", "rst_jax.main", *options, f"--workdir={workdir}", *more]
    return subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def start_all(workdir, count, options=TINY):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    join = [f"--coordinator=localhost:{port}", f"--num_processes={count}"]
    return [start(workdir, 1, *join, f"--process_id={i}", options=options) for i in range(count)]


def ended(*processes):
    """Exit codes and outputs."""
    outs = [p.communicate(timeout=300)[0] for p in processes]
    return [p.returncode for p in processes], outs


def final_state(workdir):
    import orbax.checkpoint as ocp

    folder = max((workdir / "checkpoints" / "ratio-0.3" / "latest").iterdir(), key=lambda path: int(path.name))
    with ocp.PyTreeCheckpointer() as checkpointer:  # as NumPy arrays: the devices that saved it are not here
        saved = checkpointer.metadata(folder / "state").item_metadata.tree
        as_arrays = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
        tree = checkpointer.restore(folder / "state", restore_args=as_arrays)
    return {jax.tree_util.keystr(p): np.asarray(x) for p, x in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.slow
def test_two_processes_are_one_process_of_two_devices(tmp_path):
    codes, outs = ended(start(tmp_path / "one", 2))
    assert codes == [0], outs
    codes, outs = ended(*start_all(tmp_path / "two", 2))
    assert codes == [0, 0], outs
    assert "report:" in outs[0]
    assert "report:" not in outs[1]
    tickets = [load_ticket(tmp_path / w / "tickets" / "ratio-0.3.ticket") for w in ("one", "two")]
    assert tickets[0].digest == tickets[1].digest
    assert tickets[0].origin == tickets[1].origin
    flags = [np.load(tmp_path / w / "results" / "flags" / "ratio-0.3.npz") for w in ("one", "two")]
    for name in ("natural", "robust", "violations"):
        np.testing.assert_array_equal(flags[0][name], flags[1][name])
    assert flags[0]["natural"].shape == (61,)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("count", "tolerance"), [(2, 0.0), (4, 1e-6)])
def test_twenty_steps_of_several_processes_are_those_of_one(tmp_path, count, tolerance):
    codes, outs = ended(start(tmp_path / "one", count, options=TWENTY))
    assert codes == [0], outs
    codes, outs = ended(*start_all(tmp_path / "all", count, options=TWENTY))
    assert codes == [0] * count, outs
    one, several = (final_state(tmp_path / w) for w in ("one", "all"))
    assert one["['step']"] == 20
    for name, array in one.items():
        scale = np.abs(array).max()
        np.testing.assert_allclose(several[name], array, rtol=0, atol=tolerance * scale, err_msg=name)


def wait_for(workdir, condition, *processes):
    """Until the metrics satisfy the condition, or a process has ended."""
    while not condition(read_lines(workdir / "metrics.jsonl")) and all(p.poll() is None for p in processes):
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_signal_to_one_process_stops_both_and_they_go_on_as_one(tmp_path):
    """SIGTERM in mid-epoch; then on one process of two devices: every array as never stopped."""
    long = [*TWENTY, "--config.epochs=4", "--config.checkpoint_every_epochs=100", "--config.evaluate.every_epochs=100"]
    codes, outs = ended(start(tmp_path / "whole", 2, options=long))
    assert codes == [0], outs
    stopped = tmp_path / "stopped"
    processes = start_all(stopped, 2, options=long)
    wait_for(stopped, bool, *processes)
    processes[1].send_signal(signal.SIGTERM)
    codes, outs = ended(*processes)
    assert codes == [75, 75], outs
    assert "stopped by SIGTERM; the same command goes on from here" in outs[0]
    codes, outs = ended(start(stopped, 2, options=long))
    assert codes == [0], outs
    assert "going on after epoch" in outs[0]
    whole, again = final_state(tmp_path / "whole"), final_state(stopped)
    for name, array in whole.items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)
    assert read_lines(tmp_path / "whole" / "metrics.jsonl") == read_lines(stopped / "metrics.jsonl")


@pytest.mark.slow
def test_when_the_minutes_are_over_all_processes_stop_at_one_place(tmp_path):
    codes, outs = ended(*start_all(tmp_path / "run", 2, options=[*TWENTY, "--minutes=0"]))
    assert codes == [75, 75], outs
    assert "stopped as the 0 minutes end; the same command goes on from here" in outs[0]
    codes, outs = ended(start(tmp_path / "run", 2, options=TWENTY))
    assert codes == [0], outs
    assert "going on after epoch" in outs[0]


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_others_with_the_code_to_start_again(tmp_path, killed):
    long = [*TWENTY, "--config.epochs=50", "--config.evaluate.every_epochs=50"]
    processes = start_all(tmp_path / "run", 2, options=long)
    wait_for(tmp_path / "run", bool, *processes)
    processes[killed].kill()
    codes, outs = ended(*processes)
    assert codes[killed] == -signal.SIGKILL
    assert codes[1 - killed] == 75, outs
    assert "another process was lost" in outs[1 - killed]


@pytest.mark.slow
def test_processes_whose_workdirs_are_not_one_folder_are_refused_with_code_2(tmp_path):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    join = [f"--coordinator=localhost:{port}", "--num_processes=2"]
    codes, outs = ended(*(start(tmp_path / "x" / str(i), 1, *join, f"--process_id={i}") for i in range(2)))
    assert codes == [2, 2], outs
    for out in outs:
        assert "of process 1 is not the folder that process 0 has begun; expected one folder on storage" in out
        assert "Traceback" not in out


@pytest.mark.slow
def test_a_card_of_two_processes_is_that_of_one(tmp_path):
    """The second process never writes; both see the finished rows, and the first holds the folder."""
    few = [*TINY, "--config.evaluate.examples=8"]
    codes, outs = ended(start(tmp_path / "one", 2, options=[*few, "--config.stages=search"]))
    assert codes == [0], outs
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    card = [*few, "--config.stages=evaluate,cards,report", "--config.evaluate.card=autoattack"]
    codes, outs = ended(start(tmp_path / "one", 2, options=card))
    assert codes == [0], outs
    for _ in range(2):  # the second time every row is there
        codes, outs = ended(*start_all(tmp_path / "two", 2, options=card))
        assert codes == [0, 0], outs
        assert "ratio-0.3: " in outs[0]
    folders = [tmp_path / w / "results" / "cards" / "ratio-0.3-autoattack" for w in ("one", "two")]
    records = [dataclasses.replace(load_card(folder), provenance=None) for folder in folders]
    assert records[0] == records[1]
    for name in ("examples.npz", "gallery.npz"):
        a, b = (read_arrays(folder / name) for folder in folders)
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)
