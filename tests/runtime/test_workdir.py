"""Folders that one process holds: locks, what was left, what was removed."""

import errno
import fcntl
import os
import shutil

import pytest

from rst_jax.evaluation.images import ImageFile
from rst_jax.runtime import files
from rst_jax.runtime.work import Failed
from rst_jax.runtime.workdir import Claim, InUse, in_use
from rst_jax.tickets.store import save_tickets
from rst_jax.training.checkpoint import RunCheckpoints
from rst_jax.training.metrics import MetricsWriter


def claim(folder):
    return Claim(folder, "config.json", {"a": 1}, f"workdir {folder}", "run", "--workdir")


def work(folder, *steps):
    """Take the steps while the folder is held."""
    with claim(folder).held():
        for step in steps:
            step()


def write(path):
    return lambda: files.write_text(path, "")


def refuse(monkeypatch, code):
    def flock(file, how):
        raise OSError(code, "as some file systems say")

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_without_locks_it_goes_on_and_says_so(code, tmp_path, monkeypatch, capsys):
    refuse(monkeypatch, code)
    (left := tmp_path / ".x.json.0123456789ab").write_text("another process may write it")
    with claim(tmp_path).held():
        assert not in_use(tmp_path)
        assert left.exists()
    (said,) = capsys.readouterr().err.splitlines()
    assert said == f"rst_jax: the file system of workdir {tmp_path} has no locks: see that no other process uses it."


@pytest.mark.parametrize("code", [errno.EWOULDBLOCK, errno.EACCES])
def test_in_use_is_what_another_process_has_locked(code, tmp_path, monkeypatch):
    with claim(tmp_path).held():
        assert in_use(tmp_path)
        with pytest.raises(InUse, match="in use by another process"), claim(tmp_path).held():
            pass
    assert not in_use(tmp_path)
    refuse(monkeypatch, code)
    assert in_use(tmp_path)
    with pytest.raises(InUse), claim(tmp_path).held():
        pass


def test_what_cannot_be_locked_for_another_reason_is_told_and_not_waited_for(tmp_path, monkeypatch):
    refuse(monkeypatch, errno.EIO)
    assert not in_use(tmp_path)
    with pytest.raises(ValueError, match="cannot be written: as some file systems say"), claim(tmp_path).held():
        pass


def test_without_locks_who_comes_later_has_the_folder(tmp_path, monkeypatch):
    refuse(monkeypatch, errno.ENOLCK)
    with pytest.raises(Failed, match="removed or taken"):
        work(tmp_path, lambda: (tmp_path / ".lock").write_text("taken"), write(tmp_path / "theirs"))
    assert not (tmp_path / "theirs").exists()


def test_a_folder_that_is_removed_is_not_made_again(tmp_path):
    folder = tmp_path / "run"
    results = folder / "results"
    with pytest.raises(Failed, match="removed"):
        work(folder, write(results / "x.json"), lambda: shutil.rmtree(folder), write(results / "y.json"))
    assert not folder.exists()
    with pytest.raises(Failed, match="removed"), claim(folder).held():
        shutil.rmtree(folder)
    assert not folder.exists()
    with claim(folder).held():
        pass


def test_what_was_written_while_it_was_removed_goes_too_and_nothing_else(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(Failed):
        work(folder, write(folder / "left"), (folder / ".lock").unlink, (folder / "config.json").unlink)
    assert not folder.exists()
    with pytest.raises(Failed):
        work(
            folder,
            lambda: folder.rename(tmp_path / "elsewhere"),
            folder.mkdir,
            lambda: (folder / "mine").write_text(""),
        )
    assert [path.name for path in folder.iterdir()] == ["mine"]
    assert (tmp_path / "elsewhere" / "config.json").exists()


def test_a_lock_that_somebody_removed_is_no_reason_to_stop(tmp_path):
    with claim(tmp_path).held():
        (tmp_path / ".lock").unlink()
        files.write_text(tmp_path / "x", "")


def test_what_killed_processes_left_is_removed_and_nothing_that_another_holds(tmp_path):
    left = [
        ".config.json.0123456789ab",
        "results/flags/.a.npz.0123456789ab",
        "checkpoints/.tickets-new/x",
        "checkpoints/.tickets-old/x",
        "checkpoints/a/latest/5.orbax-checkpoint-tmp/state/x",
        "checkpoints/.tickets-new.orbax-checkpoint-tmp/x",
        "checkpoints/a/best/.removed-old/5/x",
    ]
    kept = [
        "notes.0123456789ab",
        ".hidden",
        ".mine-old",
        "checkpoints/a/latest/4/x",
        "point/.lock",
        "point/.x.0123456789ab",
    ]
    with claim(tmp_path).held():
        for name in left + kept:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("")
    with claim(tmp_path).held():
        there = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
        assert there == {*kept, ".lock", "config.json"}


def test_a_file_that_cannot_be_written_leaves_nothing_and_is_named(tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"x\.json"):
        files.write_json(tmp_path / "x.json", {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: MetricsWriter(folder).write("a", 1, {"loss": 1.0}),
        lambda folder: MetricsWriter(folder).begin("a", 0),
        lambda folder: RunCheckpoints(folder / "checkpoints" / "a"),
        lambda folder: save_tickets(folder / "checkpoints" / "tickets", {}, []),
        lambda folder: ImageFile(folder / "rows" / "a" / "adversarial.npy").make((1, 2, 2, 1)),
        lambda folder: files.write_arrays_in_pieces(folder / "adversarials.npz", {}),
    ],
)
def test_nobody_who_writes_makes_a_removed_folder_again(write, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(Failed, match="removed"):
        work(folder, lambda: shutil.rmtree(folder), lambda: write(folder))
    assert not folder.exists()


@pytest.mark.parametrize("target", ["thesis", "nothing"])
def test_a_lock_that_is_a_link_touches_nothing_that_it_points_to(tmp_path, target):
    (tmp_path / "thesis").write_text("all of it")
    folder = tmp_path / "w"
    folder.mkdir()
    (folder / ".lock").symlink_to(tmp_path / target)
    assert not in_use(folder)
    with pytest.raises(ValueError, match="cannot be written"):
        work(folder)
    assert (tmp_path / "thesis").read_text() == "all of it"
    assert not (tmp_path / "nothing").exists()


def test_a_lock_that_is_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / ".lock")
    assert not in_use(tmp_path)
    with pytest.raises(ValueError, match="cannot be written"):
        work(tmp_path)
