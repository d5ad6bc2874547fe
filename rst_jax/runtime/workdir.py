"""Folders that belong to one question at a time, and to one process: a run's workdir, an evaluation card's folder."""

import contextlib
import dataclasses
import fcntl
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rst_jax.runtime.files import write_json
from rst_jax.runtime.mesh import on_main


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
          ValueError: it is a file, holds other files, belongs to another question, cannot be written or is in use.
        """
        with contextlib.ExitStack() as held:
            on_main(lambda: self._take(held))
            yield

    def _take(self, held: contextlib.ExitStack) -> None:
        path = self.folder / self.record
        self.refuse_foreign()
        if not self.begin and not path.exists():
            raise ValueError(f"{self.called} holds no {self.holds} yet; {self.start}.")
        self._lock(held)
        now, missing = json.loads(json.dumps([self.question, self.missing]))
        before = self._read(path)
        if before is not None:
            self._compare({**missing, **dotted(before)}, dotted(now))
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

    def _lock(self, held: contextlib.ExitStack) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context((self.folder / ".lock").open("w"))
        except OSError as error:
            raise ValueError(f"{self.called} cannot be written: {error.strerror}.") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InUse(
                f"{self.called} is in use by another process; wait for it or take another {self.instead}."
            ) from None

    def _read(self, path: Path) -> dict[str, Any] | None:
        if not path.exists():
            return None
        try:
            return dict(json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
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
    try:
        with (folder / ".lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def dotted(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The fields of nested sections by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in nested.items():
        section = isinstance(value, dict)
        found |= dotted(value, f"{prefix}{name}.") if section else {f"{prefix}{name}": value}
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
    return f"{text[:12]}..." if re.fullmatch("[0-9a-f]{64}", text) else text
