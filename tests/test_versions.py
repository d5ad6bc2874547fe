"""What an earlier version wrote: workdirs go on, tickets and cards load, for ever."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

import rst_jax
from rst_jax.config import Config
from rst_jax.experiments.run import Run
from rst_jax.records import R2SRecord, TicketRecord, TransferRecord, read_json
from rst_jax.runtime.files import read_lines
from rst_jax.runtime.workdir import dotted

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
DIGESTS = {"ratio-0.3": "fd59038c", "ratio-0.5": "fc230540"}
COMMAND = [
    "--config=configs/digits.py",
    "--config.pattern=kernel",
    "--config.remaining_ratios=(0.3,0.5)",
    "--config.epochs=6",
    "--config.evaluate.examples=60",
    "--config.dense.epochs=2",
    "--config.evaluate.every_epochs=2",
    "--config.checkpoint_every_epochs=1",
    "--config.holdout=100",
    "--config.train_examples=640",
]


def unpacked(name, folder):
    with tarfile.open(GOLDEN / f"{name}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return next(p for p in folder.iterdir() if p.is_dir())


def run(workdir, *more):
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    words = [sys.executable, "-m", "rst_jax.main", *COMMAND, f"--workdir={workdir}", *more]
    done = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_workdir_of_0_3_0_that_was_stopped_goes_on(tmp_path):
    workdir = unpacked("workdir-0.3.0-stopped", tmp_path)
    before = read_lines(workdir / "metrics.jsonl")
    told = run(workdir)
    assert "ratio-0.3: already drawn" in told or "ratio-0.3: going on after epoch 6 of 6" in told
    assert "ratio-0.5: going on after epoch 3 of 6" in told
    assert read_lines(workdir / "metrics.jsonl")[: len(before)] == before
    for name in ("ratio-0.3", "ratio-0.5", "dense"):
        ticket = rst_jax.load_ticket(workdir / "tickets" / f"{name}.ticket")
        assert ticket.kind == ("dense" if name == "dense" else "scratch")
    config = json.loads((workdir / "config.json").read_text())["config"]
    assert config["stages"]
    assert "task" not in config


@pytest.mark.slow
def test_a_finished_workdir_of_0_3_0_is_measured_as_it_was(tmp_path):
    workdir = unpacked("workdir-0.3.0-finished", tmp_path)
    records = {p.stem: p for p in (workdir / "results").glob("*.json")}
    kinds = {"transfer": TransferRecord, "r2s": R2SRecord}
    before = {name: read_json(path, kinds.get(name, TicketRecord)) for name, path in records.items()}
    records["ratio-0.3"].write_text("{cut")  # a broken record is made again
    for flags in (workdir / "results" / "flags").iterdir():
        flags.unlink()  # so that every image is attacked again
    told = run(workdir)
    assert told.count("already drawn") == 3
    for name, path in records.items():
        after = read_json(path, kinds.get(name, TicketRecord))
        for field in ("natural", "robust", "digest", "digests", "transfer_only", "worst_of_pool"):
            assert getattr(after, field, None) == getattr(before[name], field, None), (name, field)


def test_tickets_of_0_3_0_load(tmp_path):
    workdir = unpacked("workdir-0.3.0-finished", tmp_path)
    images = np.random.default_rng(0).uniform(size=(3, 8, 8, 1)).astype(np.float32)
    for name, digest in DIGESTS.items():
        ticket = rst_jax.load_ticket(workdir / "tickets" / f"{name}.ticket")
        assert ticket.digest.startswith(digest)
        assert (ticket.kind, ticket.name, ticket.origin.pattern, ticket.origin.epoch) == ("scratch", name, "kernel", 6)
        assert ticket(images).shape == (3, 10)
    dense = rst_jax.load_ticket(workdir / "tickets" / "dense.ticket")
    assert (dense.kind, dense.masks) == ("dense", {})
    stored = rst_jax.load_r2s(workdir / "checkpoints" / "tickets").tickets
    assert [t.digest[:8] for t in stored] == list(DIGESTS.values())


def test_a_card_of_0_3_0_is_shown(tmp_path):
    record = rst_jax.load_card(unpacked("card-0.3.0", tmp_path))
    assert record.verdict == "trustworthy"
    assert record.n == 20


@pytest.mark.parametrize("name", list(dotted(Config().to_dict())))
def test_a_workdir_that_does_not_know_a_field_goes_on_where_it_is_the_default(name, tmp_path):
    """Each field in turn is one that a later version has added."""
    config = Config(dataset="digits", model="resnet_digits", holdout=100)
    workdir = tmp_path / "w"
    claim = Run(config, workdir, print).claim
    with claim.held():
        pass
    written = json.loads((workdir / "config.json").read_text())
    *sections, last = name.split(".")
    here = written["config"]
    for section in sections:
        here = here[section]
    is_default = here[last] == dotted(json.loads(json.dumps(Config().to_dict())))[name]
    del here[last]
    (workdir / "config.json").write_text(json.dumps(written))
    if is_default or config.may_change(name):
        with claim.held():
            pass
    else:
        with pytest.raises(ValueError, match=f"belongs to another run: config.{name} was"), claim.held():
            pass
