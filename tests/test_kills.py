"""Killed at operations on files, and started again until it comes through."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rst_jax.runtime.files import read_lines
from rst_jax.tickets.file import load_ticket
from rst_jax.training.metrics import _events
from tests.test_main import final_state

ROOT = Path(__file__).parent.parent
DRAW = [
    "--config=configs/digits.py",
    "--config.remaining_ratios=(0.3,)",
    "--config.epochs=3",
    "--config.dense.train=False",
    "--config.train_examples=320",
    "--config.evaluate.steps=1",
    "--config.evaluate.every_epochs=1",
    "--config.evaluate.examples=16",
    "--config.checkpoint_every_epochs=1",
]


class Command:
    """The command in processes that are forked from one."""

    def __init__(self, process):
        self.process = process

    def __call__(self, n, *arguments):
        """Its exit code, and its operations on files, of which the n-th was not done any more."""
        self.process.stdin.write(json.dumps([n, arguments]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    cache = str(tmp_path_factory.mktemp("cache"))
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": cache}
    with subprocess.Popen(
        [sys.executable, "-m", "tests.killing", folder],
        env=environment, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        yield folder, Command(process)
        process.stdin.close()


def names(workdir):
    """Of all files and folders; Orbax and TensorBoard choose some of theirs anew in every run."""
    found = [str(path.relative_to(workdir)) for path in workdir.rglob("*")]
    chosen = (r"[0-9a-f]{32}", r"(?<=tfevents\.).*")
    return sorted({re.sub("|".join(chosen), "*", name) for name in found})


def points(workdir, run):
    """Of TensorBoard: (name, step, value), in any order."""
    files = list((workdir / "tensorboard" / run).iterdir())
    return sorted(
        (value.tag, event.step, value.simple_value)
        for file in files
        for event in _events(file)
        for value in event.summary.value
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("seed", range(3))
def test_killed_before_any_operation_on_a_file_it_loses_nothing_and_leaves_nothing(command, seed):
    folder, run = command
    whole, killed = folder / "whole", folder / f"killed-{seed}"
    code, operations = run(0, *DRAW, f"--workdir={whole}")
    assert code == 0
    pick, kills = random.Random(seed), []
    while True:
        code, done = run(pick.randint(15, len(operations) * 2 // 3), *DRAW, f"--workdir={killed}")
        if code == 0:
            break
        assert code == -9, done[-1:]
        kills.append(done[-1])
        assert len(kills) < 40
    assert kills
    assert names(whole) == names(killed), kills
    rows = read_lines(whole / "metrics.jsonl")
    assert read_lines(killed / "metrics.jsonl") == rows
    expected = [
        (name, row["step"], value) for row in rows for name, value in row.items() if name not in ("run", "step")
    ]
    for workdir in (whole, killed):
        found = points(workdir, "ratio-0.3")
        assert [point[:2] for point in found] == [point[:2] for point in sorted(expected)]
        np.testing.assert_allclose([p[2] for p in found], [p[2] for p in sorted(expected)], rtol=1e-6)
    assert points(whole, "ratio-0.3") == points(killed, "ratio-0.3")
    (step, state), (again, same) = (final_state(workdir, "ratio-0.3") for workdir in (whole, killed))
    assert step == again
    for name, array in state.items():
        np.testing.assert_array_equal(same[name], array, err_msg=name)
    tickets = [load_ticket(workdir / "tickets" / "ratio-0.3.ticket") for workdir in (whole, killed)]
    assert tickets[0].digest == tickets[1].digest
