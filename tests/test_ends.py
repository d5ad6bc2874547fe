"""How the command ends where the machine, the storage or a person stops it: in processes of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rst_jax.evaluation.images import ImageFile
from rst_jax.main import run_command

ROOT = Path(__file__).parent.parent
DRAW = [
    "--config=configs/digits.py",
    "--config.remaining_ratios=(0.3,)",
    "--config.epochs=2",
    "--config.dense.train=False",
    "--config.train_examples=320",
    "--config.evaluate.steps=1",
    "--config.evaluate.examples=16",
    "--config.stages=search",
]
TICKET = next((ROOT / "zoo").glob("digits-*.ticket"))
EVALUATE = ["evaluate", str(TICKET), "--dataset=digits", "--eps=0.1", "--examples=4", "--attacks=fgsm"]
BEGIN = "runpy.run_module('rst_jax.main', run_name='__main__', alter_sys=True)"
# Sends itself a signal when it comes to import a module.
SIGNALLED = """
import sys
def hook(event, arguments):
    if event == "import" and arguments[0] == {module!r}:
        os.kill(os.getpid(), {number})
sys.addaudithook(hook)
"""


def run(*arguments, before="", cache="", **environment):
    """Exit code and standard error of the command, after some Python."""
    python = ["-c", f"import os, runpy\n{before}\n{BEGIN}"] if before else ["-m", "rst_jax.main"]
    keep = {"JAX_COMPILATION_CACHE_DIR": str(cache)} if cache else {}
    there = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **keep, **environment}
    there = {name: value for name, value in there.items() if value is not None}
    command = [sys.executable, *python, *arguments]
    done = subprocess.run(command, env=there, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


@pytest.mark.parametrize("arguments", [DRAW, EVALUATE])
@pytest.mark.parametrize("module", ["jax", "sklearn.datasets"])
@pytest.mark.parametrize(
    ("number", "code", "words"),
    [
        (15, 75, "stopped by SIGTERM; the same command goes on from here."),
        (2, 1, "stopped; the same command goes on from what was last saved."),
    ],
)
def test_stopped_before_the_work_begins_it_says_so_and_makes_nothing(arguments, module, number, code, words, tmp_path):
    place = f"--{'out' if arguments is EVALUATE else 'workdir'}={tmp_path / 'w'}"
    assert run(*arguments, place, before=SIGNALLED.format(module=module, number=number)) == (
        code,
        f"rst_jax: {words}\n",
    )
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--workdir=gs://bucket/x"], "gs://bucket/x: expected a path of this machine's file systems"),
        (["--workdir=~nosuchuser/x"], "nobody knows the home folder ~nosuchuser"),
        (["--config.compilation_cache=~nosuchuser/x"], "nobody knows the home folder ~nosuchuser"),
        (["--coordinator=host", "--num_processes=2", "--process_id=0"], "as localhost:12345, or auto; got 'host'"),
        (["--coordinator=h:99999", "--num_processes=2", "--process_id=0"], "got 'h:99999'"),
        (["--coordinator=h:1", "--num_processes=2", "--process_id=2"], "2"),
    ],
)
def test_an_address_that_cannot_be_is_told_in_a_sentence(options, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    code = run_command(["main", *DRAW, f"--workdir={tmp_path / 'w'}", "--config.compilation_cache=", *options])
    said = capsys.readouterr().err
    assert code == 2, said
    assert said.startswith("rst_jax: ")
    assert words in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "platforms", "words"),
    [
        (["--coordinator=auto"], "cpu", "--coordinator=auto: no cluster tells who takes part"),
        ([], "cuda", "JAX_PLATFORMS=cuda cannot be had here"),
    ],
)
def test_what_the_machine_has_not_is_told_in_a_sentence(options, platforms, words, tmp_path):
    code, said = run(*DRAW, f"--workdir={tmp_path / 'w'}", *options, JAX_PLATFORMS=platforms)
    assert code == 2, said
    assert said.startswith("rst_jax: ")
    assert words in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_process_without_a_home_and_a_name_is_as_any_other_where_none_is_asked_for(tmp_path):
    if os.getuid():
        pytest.skip("only root can take another user's number")
    nobody = {"before": "os.setreuid(54321, -1)", "HOME": None}
    code, said = run(*EVALUATE[:-3], f"--out={tmp_path / 'card'}", **nobody)
    assert (code, said.split(",")[0]) == (2, "rst_jax: expected --eps")
    code, said = run(*DRAW, "--config.dataset=cifar10", f"--workdir={tmp_path / 'w'}", **nobody)
    assert code == 2
    assert said == "rst_jax: ~/tensorflow_datasets: nobody knows the home folder ~; write the whole path.\n"


@pytest.mark.slow
def test_a_full_disk_and_a_broken_checkpoint_are_a_sentence_alone(tmp_path):
    """A disk that takes no file over 200 kB; and checkpoints cut to nothing."""
    work, cache = f"--workdir={tmp_path / 'w'}", tmp_path / "cache"
    assert run(*DRAW, work, cache=cache) == (0, "")

    small = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))"
    code, said = run(*DRAW, f"--workdir={tmp_path / 'small'}", before=small, cache=cache)
    assert code == 1, said
    assert said.startswith("rst_jax: ")
    assert said.endswith("the checkpoint could not be written (File too large).\n")
    assert said.count("\n") == 1
    shutil.rmtree(tmp_path / "w" / "tickets")
    for file in (tmp_path / "w" / "checkpoints" / "ratio-0.3").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    code, said = run(*DRAW, work, cache=cache)
    assert code == 1, said
    assert said.startswith("rst_jax: ")
    assert "this checkpoint cannot be used" in said
    assert said.count("\n") == 1


def test_a_disk_that_fills_up_is_an_error_and_no_signal(tmp_path):
    """A file of adversarial images has holes, which are filled later."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60k", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("no small disk can be made here")
    try:
        file = ImageFile(tmp_path / "adversarial.npy")
        file.make((1000, 8, 8, 1))
        file.put(np.asarray([3, 999]), np.full((2, 8, 8, 1), [[[[2.0]]], [[[3.0]]]], np.float32))
        np.testing.assert_array_equal(file.get(np.asarray([999, 3, 4])).mean((1, 2, 3)), [3.0, 2.0, 0.0])
        with pytest.raises(OSError, match="No space left"):
            file.put(np.arange(500), np.ones((500, 8, 8, 1), np.float32))
    finally:
        subprocess.run(["umount", tmp_path], check=True)
