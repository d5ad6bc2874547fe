"""The one door for what is read, from anybody: ordinary files, JSON, archives of arrays without pickle.

A file's size, and those that it declares, are looked at before anything is unpacked, and whatever is wrong with it is a
ValueError that names it.
"""

import contextlib
import dataclasses
import math
import os
import stat
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, BinaryIO, TypeVar

import msgspec
import numpy as np

R = TypeVar("R")
_TEXT = 2**26  # bytes of a text that are read
_ROOM, _TIMES = 2**26, 50  # bytes that any archive may unpack to; times its own size that a larger one may
_ENTRIES = 10_000  # of an archive


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """An ordinary file to be read, and its bytes; a pipe, which may never end, is none.

    Raises:
      ValueError: there is no such file, or it cannot be read; it is named.
    """
    try:
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file.") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}).") from None
    told = os.fstat(number)
    if not stat.S_ISREG(told.st_mode):
        os.close(number)
        raise ValueError(f"{path}: expected an ordinary file.")
    with os.fdopen(number, "rb") as file:
        yield file, told.st_size


def read_text(path: Path) -> str:
    """Text in UTF-8.

    Raises:
      ValueError: there is no such file, or it is no text or too long; it is named.
    """
    with opened(path) as (file, size):
        if size > _TEXT:
            raise ValueError(f"{path}: expected at most {_TEXT:,} bytes of text; got {size:,}.")
        try:
            return file.read(_TEXT).decode()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: cannot be read ({error}).") from error


def from_json(text: str | bytes, kind: type[R]) -> R:
    """What JSON says, of a type: a dataclass, `dict[str, int]`, ...; numbers are finite.

    Raises:
      ValueError: it says something else.
    """
    try:
        return msgspec.json.decode(text, type=kind)
    except (RecursionError, UnicodeDecodeError) as error:
        raise ValueError(f"not readable as JSON: {error}") from error


def read_json(path: Path, kind: type[R]) -> R:
    """The content of a JSON file, of a type; see `from_json`.

    Raises:
      ValueError: there is no such file, or it says something else; it is named.
    """
    text = read_text(path)
    try:
        return from_json(text, kind)
    except ValueError as error:
        raise ValueError(f"{path}: expected a {getattr(kind, '__name__', kind)}; {str(error).rstrip('.')}.") from error


@dataclasses.dataclass(frozen=True)
class Stored:
    """An array as its file declares it, not yet unpacked.

    Attributes:
      shape, dtype: what it will have. columns: it is stored column by column.
      start: its bytes from their beginning. path: of the file, for messages.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    columns: bool
    start: Callable[[], IO[bytes]]
    path: Path

    def read(self) -> np.ndarray:
        """The array.

        Raises:
          ValueError: it is damaged.
        """
        with _readable(self.path), self.start() as member:
            return np.lib.format.read_array(member, allow_pickle=False)

    def pieces(self, rows: int) -> Iterator[np.ndarray]:
        """So many rows at a time.

        Raises:
          ValueError: it is damaged, or has no rows.
        """
        with _readable(self.path):
            if self.columns or not self.shape:
                raise ValueError("expected rows of numbers")
            member = self.start()
            _header(member)
        with member:
            for first in range(0, self.shape[0], rows):
                there = (min(rows, self.shape[0] - first), *self.shape[1:])
                with _readable(self.path):
                    read = member.read(math.prod(there) * self.dtype.itemsize)
                    piece = np.frombuffer(read, self.dtype).reshape(there)
                yield piece


@contextlib.contextmanager
def stored_arrays(path: Path) -> Iterator[dict[str, Stored]]:
    """The arrays that an .npz file declares, to be read as long as the context lasts.

    Raises:
      ValueError: it is no .npz file, or it would unpack to far more than it is; it is named.
    """
    with opened(path) as (raw, size), contextlib.ExitStack() as stack:
        with _readable(path):
            if raw.read(6) == np.lib.format.MAGIC_PREFIX:
                raise ValueError("it is one array, as an .npy file; expected several, as an .npz file")
            stored = _declared(path, stack.enter_context(zipfile.ZipFile(raw)), size)
        yield stored


def check_archive(file: zipfile.ZipFile, size: int) -> list[zipfile.ZipInfo]:
    """The entries of an archive of so many bytes, each once, plainly packed, and not far more than it when unpacked.

    Raises:
      ValueError: what is not so.
    """
    entries = file.infolist()
    unpacked = sum(entry.file_size for entry in entries)
    if len(entries) > _ENTRIES or unpacked > max(_ROOM, _TIMES * size):
        raise ValueError(f"{size:,} bytes declare {len(entries):,} entries of {unpacked:,} bytes")
    if len({entry.filename for entry in entries}) < len(entries):
        raise ValueError("two entries have one name")
    if any(entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for entry in entries):
        raise ValueError("an entry is neither stored nor deflated")
    return entries


def _declared(path: Path, file: zipfile.ZipFile, size: int) -> dict[str, Stored]:
    found = {}
    for entry in check_archive(file, size):
        with file.open(entry) as member:
            shape, columns, dtype = _header(member)
            if member.tell() + math.prod(shape) * dtype.itemsize != entry.file_size:
                raise ValueError(f"{entry.filename} is not of the size of its {dtype} {list(shape)}")
        found[entry.filename.removesuffix(".npy")] = Stored(shape, dtype, columns, partial(file.open, entry), path)
    return found


def _header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(member)
    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, columns, dtype = headers[version](member)
    if dtype.hasobject or not dtype.itemsize or any(n < 0 for n in shape):
        raise ValueError(f"expected an array of numbers or text; got {dtype} {list(shape)}")
    return shape, columns, dtype


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """What NumPy, zipfile and zlib say of a broken file, of a dozen kinds, as one."""
    try:
        yield
    except Exception as error:
        told = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: not a readable file of arrays ({told}).") from error
