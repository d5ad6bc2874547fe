"""Files that appear whole or not at all, and what can be read back: JSON, arrays without pickle, JSON lines."""

import contextlib
import dataclasses
import io
import json
import math
import re
import shutil
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

# What a killed process leaves: a file or folder of `whole` or `save_tickets`, or one of Orbax.
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{12}|\..+[.-](new|old)|.+\.orbax-checkpoint-tmp(-\d+)?")
_guards: list[tuple[Path, Callable[[], None]]] = []  # of folders that are held, each inside those before it


@contextlib.contextmanager
def guarded(folder: Path, check: Callable[[], None]) -> Iterator[None]:
    """Within it, `check` is called before anything is written below the folder; it may raise."""
    guard = folder.absolute(), check
    _guards.append(guard)
    try:
        yield
    finally:
        _guards.remove(guard)


def make_folder(folder: Path) -> None:
    """Make a folder to write to; one that is guarded refuses, or is there: it is never made again."""
    folder, held = folder.absolute(), None
    for above, check in list(_guards):
        if folder.is_relative_to(above):
            check()
            held = above
    if held is None:
        folder.mkdir(parents=True, exist_ok=True)
        return
    for part in folder.relative_to(held).parts:
        held /= part
        held.mkdir(exist_ok=True)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write a file that appears at `path` at the end, or not at all: a name that no other process takes."""
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException as error:
        if isinstance(error, OSError):
            error.filename = str(path)
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def clear_temporary(folder: Path) -> None:
    """Remove what killed processes have left below a folder that this process alone holds.

    Folders below that are held by themselves (they have a lock) are left to those who hold them.
    """
    for path in sorted(folder.iterdir()):
        inside = path.is_dir() and not path.is_symlink()
        if _TEMPORARY.fullmatch(path.name):
            with contextlib.suppress(OSError):
                shutil.rmtree(path) if inside else path.unlink()
        elif inside and not (path / ".lock").exists():
            clear_temporary(path)


def write_json(path: Path, content: Any) -> None:
    """Write a dataclass or plain values; the file appears whole or not at all."""
    plain = dataclasses.asdict(content) if dataclasses.is_dataclass(content) else content  # type: ignore[arg-type]
    write_text(path, json.dumps(plain, indent=2) + "\n")


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an .npz file, whatever its name; it appears whole or not at all."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    write_bytes(path, buffer.getvalue())


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file; no pickle is loaded.

    Raises:
      ValueError: there is no such file, or it is no .npz file; it is named.
    """
    try:
        with path.open("rb") as file:
            if file.read(6) == np.lib.format.MAGIC_PREFIX:
                raise ValueError("it is one array, as an .npy file; expected several, as an .npz file")
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file.") from None
    except (AttributeError, EOFError, KeyError, OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: not a readable file of arrays ({error}).") from error


@dataclasses.dataclass(frozen=True)
class Pieces:
    """An array that is never in memory as a whole: `arrays` [k, ...] one after the other are its rows, once."""

    shape: tuple[int, ...]
    dtype: np.dtype
    arrays: Iterable[np.ndarray]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (np.ascontiguousarray(array, self.dtype) for array in self.arrays)


def write_arrays_in_pieces(path: Path, arrays: Mapping[str, np.ndarray | Pieces]) -> None:
    """As `write_arrays`, of arrays that come in pieces."""
    with whole(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as file:
        for name, array in arrays.items():
            header = {"descr": array.dtype.str, "fortran_order": False, "shape": tuple(array.shape)}
            with file.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for piece in array if isinstance(array, Pieces) else (array,):
                    member.write(np.ascontiguousarray(piece).tobytes())


@contextlib.contextmanager
def arrays_in_pieces(path: Path, rows: int) -> Iterator[dict[str, Pieces]]:
    """The arrays of an .npz file, each to be read once, one after the other, in pieces of so many rows.

    Raises:
      ValueError: it is no .npz file; it is named.
    """
    try:
        with zipfile.ZipFile(path) as file:
            yield {name.removesuffix(".npy"): _member(file, name, rows) for name in file.namelist()}
    except (EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: not a readable file of arrays ({error}).") from error


def _member(file: zipfile.ZipFile, name: str, rows: int) -> Pieces:
    with file.open(name) as member:
        shape, dtype = _header(member)

    def read() -> Iterator[np.ndarray]:
        with file.open(name) as member:
            _header(member)
            for first in range(0, shape[0], rows):
                there = (min(rows, shape[0] - first), *shape[1:])
                yield np.frombuffer(member.read(math.prod(there) * dtype.itemsize), dtype).reshape(there)

    return Pieces(shape, dtype, read())


def _header(member: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    np.lib.format.read_magic(member)
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
    if fortran or dtype.hasobject:
        raise ValueError(f"expected rows of numbers; got {dtype}, {'columns' if fortran else 'rows'} first.")
    return shape, dtype


def write_text(path: Path, text: str) -> None:
    """Write text; the file appears whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write to a temporary name beside `path`, then rename."""
    with whole(path) as temporary:
        temporary.write_bytes(content)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; a last line cut off by a kill is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
