"""Folders that belong to one question at a time: a run's workdir, an evaluation card's folder."""

import contextlib
import fcntl
import json
from pathlib import Path
from typing import Any


def refuse_foreign(folder: Path, record: str, called: str, holds: str) -> None:
    """See that a folder is new, empty or one of ours; nothing is written.

    Args:
      folder: the folder; `called`, what messages call it.
      record: the file in it that says whose it is.
      holds: what such a folder holds: "run", "evaluation".

    Raises:
      ValueError: it is a file, or holds other files.
    """
    if folder.is_file():
        raise ValueError(f"{called} is a file; take a folder.")
    if folder.exists() and not (folder / record).exists() and any(p.name[0] != "." for p in folder.iterdir()):
        raise ValueError(f"{called} holds other files and no {holds}; take an empty or a new folder.")


def hold(folder: Path, called: str, instead: str, held: contextlib.ExitStack) -> None:
    """Hold a folder, made if need be, until `held` closes; a process that dies lets go.

    Args:
      folder, called: as in `refuse_foreign`.
      instead: what else to take, in messages.
      held: closes the lock.

    Raises:
      ValueError: another process holds it, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = held.enter_context((folder / ".lock").open("w"))
    except OSError as error:
        raise ValueError(f"{called} cannot be written: {error.strerror}.") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(f"{called} is in use by another process; wait for it or take another {instead}.") from None


def read_record(path: Path, instead: str) -> dict[str, Any] | None:
    """What the file says whose the folder is; None where there is none.

    Raises:
      ValueError: it is not readable.
    """
    if not path.exists():
        return None
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); take a new {instead}.") from error
