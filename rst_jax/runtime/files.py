"""Files that appear whole or not at all, and what can be read back: JSON, arrays without pickle, JSON lines."""

import contextlib
import dataclasses
import io
import json
import math
import uuid
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np


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
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as file:
        for name, array in arrays.items():
            header = {"descr": array.dtype.str, "fortran_order": False, "shape": tuple(array.shape)}
            with file.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for piece in array if isinstance(array, Pieces) else (array,):
                    member.write(np.ascontiguousarray(piece).tobytes())
    temporary.replace(path)


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
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    temporary.write_bytes(content)
    temporary.replace(path)


def _beside(path: Path) -> Path:
    """A name that no other process takes, on any machine."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")


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
