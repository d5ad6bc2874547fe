"""Killed at operations on files, and started again until it comes through."""

import dataclasses
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rst_jax.reports.card import load_card
from rst_jax.runtime.files import read_arrays, read_lines
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


@pytest.fixture(scope="module")
def drawn(command):
    """A run that nobody disturbed, and how many operations it took."""
    folder, run = command
    code, operations = run(0, *DRAW, f"--workdir={folder / 'whole'}")
    assert code == 0
    return folder / "whole", len(operations)


def until_done(run, seed, most, *arguments):
    """Kill the command before one of its next operations, again and again; the operations."""
    pick, kills = random.Random(seed), []
    while len(kills) < 40:
        code, operations = run(pick.randint(most // 16, most), *arguments)
        if code == 0:
            assert kills
            return kills
        assert code == -9, operations[-1:]
        kills.append(operations[-1])
    raise AssertionError(kills)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("seed", range(2))
def test_killed_before_any_operation_on_a_file_a_run_loses_nothing_and_leaves_nothing(command, drawn, seed):
    (folder, run), (whole, most) = command, drawn
    killed = folder / f"killed-{seed}"
    kills = until_done(run, seed, most * 2 // 3, *DRAW, f"--workdir={killed}")
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


@pytest.mark.slow
def test_killed_before_any_operation_on_a_file_a_card_loses_nothing_and_leaves_nothing(command, drawn):
    (folder, run), (workdir, _) = command, drawn
    ticket = str(workdir / "tickets" / "ratio-0.3.ticket")
    asked = ["evaluate", ticket, "--dataset=digits", "--eps=0.1", "--examples=8", "--attacks=fgsm,pgd-20,mim"]
    asked += ["--batch_size=4", "--keep_images"]
    whole, killed = folder / "card", folder / "killed-card"
    code, operations = run(0, *asked, f"--out={whole}")
    assert code == 0
    kills = until_done(run, 0, len(operations) // 2, *asked, f"--out={killed}")
    assert names(whole) == names(killed), kills
    records = [dataclasses.replace(load_card(card), provenance=None) for card in (whole, killed)]
    assert records[0] == records[1]
    for name in ("examples.npz", "gallery.npz", "adversarials.npz"):
        a, b = (read_arrays(card / name) for card in (whole, killed))
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)
