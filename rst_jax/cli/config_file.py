"""Config files: Python that says what to draw, as data; and what a command line lays over it.

A file defines `get_config()`, which returns a ConfigDict (frozen or not) or a dict; configs/base.py explains the
fields. It may define

    sweep()    yields (name, {dotted field: value}), one pair a point; the key "source" names an earlier point
    smoke()    {dotted field: value} laid over everything for FILE:smoke, so that all of it is tried in little time
    FIGURE     {"kind": "ratio", ...}: which plot of rst_jax/reports/paper.py shows the sweep
"""

import contextlib
import dataclasses
import importlib.util
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from rst_jax import config as config_lib
from rst_jax.config import Config, near
from rst_jax.runtime.paths import local_path

SMOKE = "smoke"


@dataclasses.dataclass(frozen=True)
class ConfigFile:
    """What a config file and the command line say together.

    Attributes:
      name: the file's name without its ending, followed by "-smoke" for FILE:smoke.
      fields: of get_config(). over: dotted fields laid over them and over every point, the command line's last.
      typed: the names of those that the command line sets.
      points: of sweep(); None without one.
      figure: which plot shows the sweep; None where the file does not say.
    """

    path: Path
    name: str
    fields: Mapping[str, Any]
    over: Mapping[str, Any]
    typed: frozenset[str]
    points: list[tuple[Any, Any]] | None
    figure: Mapping[str, Any] | None

    def config(self, values: Mapping[str, Any] | None = None) -> Config:
        """The checked configuration, with the fields of a point.

        Raises:
          ValueError: a field or its value is not right.
        """
        return config_lib.from_dict(changed(self.fields, {**(values or {}), **self.over}))


def changed(fields: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of nested fields with others, by their dotted names, laid over them.

    Raises:
      ValueError: there is no such field; the nearest known one is named.
    """
    made = {name: changed(value, {}) if hasattr(value, "items") else value for name, value in fields.items()}
    for name, value in changes.items():
        if name not in config_lib.field_names():
            raise ValueError(config_lib.unknown_field(name))
        *sections, last = name.split(".")
        here = made
        for section in sections:
            here = here.setdefault(section, {})
        here[last] = value
    return made


def load(named: str, typed: Mapping[str, Any]) -> ConfigFile:
    """Read FILE or FILE:smoke, with the fields that the command line sets.

    Raises:
      ValueError: there is no such file or it does not say what is asked; in one sentence.
    """
    path, colon, variant = local_path(named), "", ""
    if not path.is_file():
        text, colon, variant = named.rpartition(":")
        path = local_path(text if colon else named)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; expected a config file, for instance configs/digits.py.")
    if not path.is_file():
        raise ValueError(f"there is no config file {path}; {_near_file(path)}")
    if path.suffix != ".py":
        raise ValueError(f"{path}: expected a Python file, whose name ends in .py; for instance configs/digits.py.")
    if colon and variant != SMOKE:
        hint = near(variant, [SMOKE], f"expected {path}:{SMOKE} or {path} alone.")
        raise ValueError(f"{path} has no variant {variant!r}; {hint}")
    module = _run(path)
    fields = _call(path, module, "get_config")
    if colon and not hasattr(module, SMOKE):
        raise ValueError(f"{path} defines no {SMOKE}(), which returns {{dotted field: value}} for a quick try.")
    small = _call(path, module, SMOKE) if colon else {}
    points = _call(path, module, "sweep") if hasattr(module, "sweep") else None
    return ConfigFile(
        path=path,
        name=path.stem + f"-{variant}" * bool(colon),
        fields=fields,
        over={**small, **typed},
        typed=frozenset(typed),
        points=points,
        figure=getattr(module, "FIGURE", None),
    )


def _run(path: Path) -> ModuleType:
    """The file as a module; it may import from the folder that its own folder lies in."""
    spec = importlib.util.spec_from_file_location("rst_jax_config", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _its_python(path, ""):
        spec.loader.exec_module(module)
    return module


def _call(path: Path, module: ModuleType, function: str) -> Any:
    """What a function of the file returns: nested dicts; of `sweep`, a list of what it yields."""
    if not hasattr(module, function):
        raise ValueError(f"{path} defines no {function}(); configs/base.py shows one.")
    with _its_python(path, f"{function}(): "):
        found = getattr(module, function)()
        if function == "sweep" and isinstance(found, Iterable) and not hasattr(found, "items"):
            return list(found)
        if function != "sweep" and hasattr(found, "items"):
            return changed(found, {})
    expected = "pairs (name, {dotted field: value})" if function == "sweep" else "a ConfigDict or a dict"
    got = "None" if found is None else type(found).__name__
    raise ValueError(f"{path}: {function}() gave {got}; expected {expected}.")


@contextlib.contextmanager
def _its_python(path: Path, doing: str) -> Iterator[None]:
    """While Python of the file runs: what it imports is found, and whatever it raises is a sentence with its line."""
    sys.path.insert(0, str(path.resolve().parent.parent))
    try:
        yield
    except (Exception, SystemExit) as error:
        said = error.msg if isinstance(error, SyntaxError) else error
        told = " ".join(f"{type(error).__name__}: {said}".split())[:300]
        raise ValueError(f"{path}: {doing}{told}{_line(path, error)}.") from error
    finally:
        sys.path.pop(0)


def _line(path: Path, error: BaseException) -> str:
    """Where an error comes from: a line of the file, or of another that is no Python."""
    its = str(path.absolute())  # as Python calls it
    if isinstance(error, SyntaxError) and error.lineno:
        return f" (line {error.lineno})" if error.filename == its else f" ({error.filename}, line {error.lineno})"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == its]
    return f" (line {lines[-1]})" if lines else ""


def _near_file(path: Path) -> str:
    there = sorted(p.name for p in path.parent.glob("*.py") if p.name != "base.py") if path.parent.is_dir() else []
    return near(path.name, there, f"there are {', '.join(there)}." if there else f"{path.parent} holds none.")
