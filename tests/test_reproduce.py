"""The reproduction script on the digits, whose command it runs for real."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import reproduce
from rst_jax.tickets.file import load_ticket

ROOT = Path(__file__).parent.parent


def call(tmp_path, minutes, *more):
    words = [
        sys.executable,
        "benchmarks/reproduce.py",
        f"--minutes={minutes}",
        "--config=configs/digits.py",
        f"--workdir={tmp_path / 'run'}",
        f"--zoo={tmp_path / 'zoo'}",
        "--config.epochs=2",
        "--config.evaluate.steps=2",
        "--config.evaluate.examples=50",
        *more,
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
    }
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_it_draws_stops_goes_on_and_keeps_what_is_finished(tmp_path):
    """A call without time only stops what it began; one with time draws both ratios; a third has nothing to do."""
    first = call(tmp_path, 0, "--ratios", "0.3", "0.6")
    assert first.returncode == 75, first.stderr
    assert "the same command goes on" in first.stdout
    assert not (tmp_path / "zoo").exists()
    second = call(tmp_path, 10, "--ratios", "0.3", "0.6")
    assert second.returncode == 0, second.stderr
    index = json.loads((tmp_path / "zoo" / "index.json").read_text())
    assert sorted(row["remaining_ratio"] for row in index) == [0.3, 0.6]
    for row in index:
        ticket = load_ticket(tmp_path / "zoo" / row["file"])
        assert ticket.digest == row["digest"]
        assert ticket.remaining_ratio == row["remaining_ratio"]
    third = call(tmp_path, 10, "--ratios", "0.3", "0.6")
    assert third.returncode == 0
    assert json.loads((tmp_path / "zoo" / "index.json").read_text()) == index


def test_the_table_sets_the_papers_figures_beside_those_it_has():
    row = {"model": "resnet18", "dataset": "cifar10", "remaining_ratio": 0.2, "natural": 0.8, "robust": 0.475}
    row |= {"attack": "PGD-20, linf eps 0.031373", "n": 10000}
    lines = reproduce.table([row, row | {"model": "conv4", "remaining_ratio": 0.1}]).splitlines()
    assert lines[1].split()[:6] == ["conv4", "cifar10", "0.1", "80.0", "47.5", "PGD-20,"]
    assert lines[2].split()[:6] == ["resnet18", "cifar10", "0.2", "80.0", "47.5", "47.8"]


def test_an_option_that_is_none_is_refused(tmp_path):
    done = call(tmp_path, 1, "--ratio=0.3")
    assert done.returncode == 2
    assert "unknown option --ratio=0.3" in done.stderr
