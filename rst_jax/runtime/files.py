"""Files that appear whole or not at all, and what can be read back: arrays without pickle, JSON lines."""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import re
import shutil
import uuid
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from rst_jax.runtime.door import from_json, read_text, stored_arrays

# What a killed process leaves: a file of `whole`, a folder of the tickets' or the runs' checkpoints, or one of Orbax.
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{12}|\.tickets-(new|old)|\.removed-old|.+\.orbax-checkpoint-tmp(-\d+)?")
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
        with contextlib.suppress(OSError):
            if _TEMPORARY.fullmatch(path.name):
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
    with stored_arrays(path) as stored:
        return {name: array.read() for name, array in stored.items()}


@dataclasses.dataclass(frozen=True)
class Pieces:
    """An array that is never in memory as a whole: `arrays` [k, ...] one after the other are its rows, once."""

    shape: tuple[int, ...]
    dtype: np.dtype
    arrays: Iterable[np.ndarray]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (np.ascontiguousarray(array, self.dtype) for array in self.arrays)


def check_arrays(path: Path, arrays: Mapping[str, np.ndarray], wanted: Mapping[str, str]) -> dict[str, int]:
    """Refuse what a file lacks, or holds in another kind or shape, and floats that are not finite.

    Args:
      path: of the file, for the message.
      arrays: that it holds.
      wanted: of each name NumPy's letter for its kind and its axes, such as "f n h w c".

    Returns:
      The length of each axis, which it has everywhere.

    Raises:
      ValueError: an array is named.
    """
    lengths: dict[str, int] = {}
    for name, (kind, *axes) in ((name, told.split()) for name, told in wanted.items()):
        if name not in arrays:
            raise ValueError(f"{path}: expected {name} as {wanted[name]!r}; it is missing.")
        array = arrays[name]
        fits = array.dtype.kind == kind and array.ndim == len(axes)
        fits = fits and all(lengths.setdefault(axis, n) == n for axis, n in zip(axes, array.shape, strict=True))
        if not fits or (kind == "f" and not np.isfinite(array).all()):
            it_is = f"{array.dtype} {list(array.shape)}"
            raise ValueError(f"{path}: expected {name} as {wanted[name]!r}, finite; it is {it_is}.")
    return lengths


def among(places: np.ndarray, n: int) -> bool:
    """Whether all are places of n things, counted from 0."""
    return bool(((places >= 0) & (places < n)).all())


def digest(*trees: PyTree) -> str:
    """SHA-256 over the paths, shapes, types and bytes of the arrays, or of `Pieces`, read one after the other."""
    sum_ = hashlib.sha256()
    for tree in trees:
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            array = leaf if isinstance(leaf, Pieces) else np.asarray(leaf)
            sum_.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
            for piece in array if isinstance(array, Pieces) else (array,):
                sum_.update(np.ascontiguousarray(piece).tobytes())
    return sum_.hexdigest()


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
    with stored_arrays(path) as stored:
        yield {name: Pieces(array.shape, array.dtype, array.pieces(rows)) for name, array in stored.items()}


def write_text(path: Path, text: str) -> None:
    """Write text; the file appears whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write to a temporary name beside `path`, then rename."""
    with whole(path) as temporary:
        temporary.write_bytes(content)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl: a "run", its "step", and numbers; a last line cut off by a kill is left out.

    Raises:
      ValueError: it is no text; it is named.
    """
    rows = []
    for line in read_text(path).splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            row = from_json(line, dict[str, int | float | str])
            texts = {name for name, value in row.items() if isinstance(value, str)}
            if texts == {"run"} and isinstance(row.get("step"), int):
                rows.append(row)
    return rows


def no_link(name: str, flags: int) -> int:
    """An opener for what is written in place: it does not follow a link to another file.

    Raises:
      OSError: it is a link.
    """
    return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
