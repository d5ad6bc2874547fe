"""The zoo's script, on the tickets that lie there."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from benchmarks import keep
from rst_jax.tickets.file import load_ticket

ZOO = Path(__file__).parent.parent / "zoo"


@pytest.fixture
def workdir(tmp_path):
    """As a run leaves it that drew two of the zoo's tickets and evaluated one."""
    run = tmp_path / "run"
    for folder in ("tickets", "results"):
        (run / folder).mkdir(parents=True)
    for name in ("ratio-0.3", "ratio-0.5"):
        (ticket,) = ZOO.glob(f"digits-*-{name.removeprefix('ratio-')}-*.ticket")
        shutil.copy(ticket, run / "tickets" / f"{name}.ticket")
    (record,) = ZOO.glob("digits-*-0.3-*.json")
    shutil.copy(record, run / "results" / "ratio-0.3.json")
    created = json.loads(record.read_text())["provenance"]["created"]
    (run / "config.json").write_text(json.dumps({"config": {}, "provenance": {"created": created}}))
    return run


def call(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["keep.py", *map(str, words)])
    return keep.main()


def test_what_is_finished_is_copied_once_with_a_line_of_the_index(workdir, tmp_path, monkeypatch, capsys):
    zoo = tmp_path / "zoo"
    for _ in range(2):
        assert call(monkeypatch, workdir, zoo, "--config=configs/digits.py") == 0
    assert "resnet_digits" in capsys.readouterr().out
    (row,) = json.loads((zoo / "index.json").read_text())
    (known,) = [r for r in json.loads((ZOO / "index.json").read_text()) if r["remaining_ratio"] == 0.3]
    assert row.keys() == known.keys()
    assert {**row, "seconds_until_here": 0} == {**known, "seconds_until_here": 0}
    assert row["seconds_until_here"] == 0.0
    assert load_ticket(zoo / row["file"]).digest == row["digest"]
    assert sorted(p.suffix for p in zoo.iterdir()) == [".json", ".json", ".ticket"]


def test_a_folder_that_is_no_run_is_refused(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        call(monkeypatch, tmp_path, tmp_path / "zoo")
    assert "holds no run" in capsys.readouterr().err


def test_the_table_sets_the_papers_figures_beside_those_it_has():
    row = {"model": "resnet18", "dataset": "cifar10", "remaining_ratio": 0.2, "natural": 0.8, "robust": 0.475}
    row |= {"attack": "PGD-20, linf eps 0.031373", "n": 10000}
    lines = keep.table([row, row | {"model": "conv4", "remaining_ratio": 0.1}]).splitlines()
    assert lines[1].split()[:6] == ["conv4", "cifar10", "0.1", "80.0", "47.5", "PGD-20,"]
    assert lines[2].split()[:6] == ["resnet18", "cifar10", "0.2", "80.0", "47.5", "47.8"]
