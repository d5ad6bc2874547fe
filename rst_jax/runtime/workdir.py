"""Folders that belong to one question at a time, and to one process: a run's workdir, an evaluation card's folder.

Who holds a folder has a lock on its file `.lock` and a word of its own in it. By the word the other processes of a run
see that theirs is the same folder, and the holder that it was not removed, or taken where there are no locks.
"""

import contextlib
import dataclasses
import errno
import fcntl
import itertools
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from rst_jax.runtime import preemption
from rst_jax.runtime.door import read_json
from rst_jax.runtime.files import clear_temporary, guarded, make_folder, no_link, write_json
from rst_jax.runtime.mesh import from_main, is_main, on_main
from rst_jax.runtime.progress import tell
from rst_jax.runtime.work import Failed

_SEEN_WITHIN = 30.0  # seconds in which the storage shows to one process what another wrote
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)  # of some NFS, FUSE, Lustre
_TAKEN = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


@dataclasses.dataclass(frozen=True)
class Claim:
    """What a folder is claimed for.

    Attributes:
      folder: made if need be.
      record: the file in it that says whose it is.
      question: plain values, in sections or not: all that must be the same.
      called: what messages call the folder. holds: what such a folder holds ("run"). instead: what else to take.
      missing: by dotted name, what stands for fields that the record does not know, since an older version wrote it.
      may_change: whether a (dotted) field may differ from the record.
      begin: it may begin here; otherwise there must be a record, which is left as it is. start: what begins one.
      about: plain values that are written beside the question and never compared.
    """

    folder: Path
    record: str
    question: Mapping[str, Any]
    called: str
    holds: str
    instead: str
    missing: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    may_change: Callable[[str], bool] = lambda name: False
    begin: bool = True
    start: str = ""
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder as long as the context lasts; a process that dies lets go.

        The first process holds it and tells the others whether it could. What is refused changes nothing.

        Raises:
          ValueError: it is a file, holds other files, belongs to another question, cannot be written or is in use, or
            it is not one folder for all processes.
          Failed: it was removed or taken by another process.
        """
        word = uuid.uuid4().hex
        with contextlib.ExitStack() as held:
            on_main(lambda: self._take(held, word))
            self._see(word)
            held.enter_context(preemption.remembered())
            yield
            if is_main():
                self._check(word)

    def _take(self, held: contextlib.ExitStack, word: str) -> None:
        path = self.folder / self.record
        self.refuse_foreign()
        if not self.begin and not path.exists():
            raise ValueError(f"{self.called} holds no {self.holds} yet; {self.start}.")
        with self._written():
            make_folder(self.folder)
            lock = held.enter_context(_open(self.folder / ".lock", os.O_RDWR | os.O_CREAT))
            alone = _lock(lock, fcntl.LOCK_EX)
        now, missing = json.loads(json.dumps([self.question, self.missing]))
        before = self._read(path)
        if before is not None:
            self._compare({**missing, **dotted(before)}, dotted(now))
        with self._written():
            self._mark(held, lock, word, alone)
            if self.begin and (before is None or any(before.get(name) != value for name, value in now.items())):
                write_json(path, {**now, **self.about})

    def refuse_foreign(self) -> None:
        """See that the folder is new, empty or one of ours.

        Raises:
          ValueError: it is a file, or holds other files.
        """
        record = self.folder / self.record
        if self.folder.is_file():
            raise ValueError(f"{self.called} is a file; take a folder.")
        if self.folder.exists() and not record.exists() and any(p.name[0] != "." for p in self.folder.iterdir()):
            raise ValueError(f"{self.called} holds other files and no {self.holds}; take an empty or a new folder.")

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except BlockingIOError:
            raise InUse(
                f"{self.called} is in use by another process; wait for it or take another {self.instead}."
            ) from None
        except OSError as error:
            raise ValueError(f"{self.called} cannot be written: {error.strerror}.") from error

    def _mark(self, held: contextlib.ExitStack, lock: IO[str], word: str, alone: bool) -> None:
        """Put the word into the folder, and watch over it."""
        if alone:
            clear_temporary(self.folder)
        else:
            tell(f"the file system of {self.called} has no locks: see that no other process uses it.")
        os.pwrite(lock.fileno(), word.encode(), 0)  # over one as long, which a full disk takes too
        os.ftruncate(lock.fileno(), len(word))
        held.callback(self._clear, word, self.folder.stat())
        held.enter_context(guarded(self.folder, lambda: self._check(word)))

    def _holds(self, word: str) -> bool | None:
        """Whether the word stands in the folder; None where there is neither a word nor the record."""
        for name in (".lock", self.record):  # somebody may think that the lock was a left one
            try:
                content = (self.folder / name).read_bytes()
            except FileNotFoundError:
                continue
            except OSError:  # a storage that fails for a moment says nothing
                return True
            return content == word.encode() or name != ".lock"
        return None

    def _check(self, word: str) -> None:
        if not self._holds(word):
            raise Failed(f"{self.called} was removed or taken by another process while this one worked in it.")

    def _clear(self, word: str, folder: os.stat_result) -> None:
        """Remove what was written while somebody removed the folder; no later command would take it."""
        with contextlib.suppress(OSError):
            if self._holds(word) is None and os.path.samestat(folder, self.folder.stat()):
                shutil.rmtree(self.folder)

    def _see(self, word: str) -> None:
        """See that it is one folder for all processes."""
        if jax.process_count() == 1:
            return
        word = from_main(np.frombuffer(word.encode(), np.uint8)).tobytes().decode()
        end = time.monotonic() + _SEEN_WITHIN
        while not (seen := self._shows(word)) and time.monotonic() < end:
            time.sleep(0.1)
        blind = np.flatnonzero(~np.asarray(multihost_utils.process_allgather(np.asarray(seen))))
        if len(blind):
            raise ValueError(
                f"{self.called} of process {blind[0]} is not the folder that process 0 has begun; expected one folder "
                "on storage that all processes share."
            )

    def _shows(self, word: str) -> bool:
        with contextlib.suppress(OSError):
            return (self.folder / ".lock").read_bytes() == word.encode()
        return False

    def _read(self, path: Path) -> dict[str, Any] | None:
        if not path.exists():
            return None
        try:
            return read_json(path, dict[str, Any])
        except ValueError as error:
            raise ValueError(f"{path}: cannot be read ({error}); take a new {self.instead}.") from error

    def _compare(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        changed = [
            "{} was {}, now {}".format(name, *map(_short, _first_apart(before.get(name), value)))
            for name, value in now.items()
            if before.get(name) != value and not self.may_change(name)
        ]
        if changed:
            raise ValueError(
                f"{self.called} belongs to another {self.holds}: {'; '.join(changed)}. Take a new {self.instead}."
            )


class InUse(ValueError):
    """Another process holds the folder."""


def in_use(folder: Path) -> bool:
    """Whether a process holds the folder now; for a look before a claim, which alone decides."""
    with contextlib.suppress(OSError), _open(folder / ".lock", os.O_RDONLY) as lock:
        try:
            _lock(lock, fcntl.LOCK_SH)
        except BlockingIOError:
            return True
    return False


def _open(path: Path, flags: int) -> IO[str]:
    """The file itself: nothing that a link points to, and nothing is taken from it yet."""
    return open(no_link(str(path), flags), "r+" if flags & os.O_RDWR else "r")


def _lock(file: IO[str], kind: int) -> bool:
    """Lock a file now; False where its file system has no locks.

    Raises:
      BlockingIOError: another process has.
    """
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            raise BlockingIOError(*error.args) from None
        if error.errno in _NO_LOCKS:
            return False
        raise
    return True


def dotted(nested: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of nested sections by their dotted names."""
    found, left = dict[str, Any](), list(nested.items())
    while left:
        name, value = left.pop(0)
        if isinstance(value, dict):
            left[:0] = [(f"{name}.{inner}", each) for inner, each in value.items()]
        else:
            found[name] = value
    return found


def _first_apart(before: Any, now: Any) -> tuple[Any, Any]:
    """The first entries in which two nested lists differ; None where one has no more."""
    while isinstance(before, list) and isinstance(now, list):
        before, now = next(pair for pair in itertools.zip_longest(before, now) if pair[0] != pair[1])
    return before, now


def _short(value: Any) -> str:
    if isinstance(value, list):
        return _short(value[0]) + ", ..." * (len(value) > 1) if value else "nothing"
    text = "nothing" if value is None else str(value)
    return f"{text[:12]}..." if re.fullmatch("[0-9a-f]{64}", text) else text[:200]
