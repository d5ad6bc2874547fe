"""The one parser of all words of the command: options, fields of the configuration, numbers and fractions."""

import argparse
import functools
import math
import re
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, NoReturn

from rst_jax.cli.config_file import ConfigFile, load
from rst_jax.config import Config, near, unknown_field
from rst_jax.ranges import Count, taken_apart

_FIELD, _INDEX = "config.", "config.sweep_index"
_NUMBER = re.compile(r"-[\d.]")  # begins a negative number, not an option


class Parser(argparse.ArgumentParser):
    """Arguments of a word; what is not right is raised as one sentence, and an unknown option names the nearest."""

    def __init__(self, word: str, description: str, **more: Any):
        self._known: list[str] = []
        self._reads_fields = False
        super().__init__(
            f"python -m rst_jax {word}",
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **more,
        )

    def add_argument(self, *names: Any, **more: Any) -> argparse.Action:
        """As argparse's."""
        action = super().add_argument(*names, **more)
        self._known += action.option_strings
        return action

    def error(self, message: str) -> NoReturn:
        """Raise it.

        Raises:
          ValueError: always.
        """
        message = re.sub(r"^argument (\S+): must", r"\1 must", message)
        raise ValueError(f"{message}; {self.prog} --help tells more.")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """The options as typed, and in `typed` the names of those that were.

        Raises:
          ValueError: anything that is not right, in one sentence.
        """
        for argument in arguments:
            option = argument.split("=")[0]
            if len(option) > 1 and option[0] == "-" and not _NUMBER.match(option) and option not in self._known:
                self._refuse(option)
        found, rest = self.parse_known_args(arguments)
        if rest:
            self.error(f"expected options only, each as --name=value; got {' '.join(rest)!r}")
        found.typed = [argument.split("=")[0] for argument in arguments if argument.startswith("--")]
        return found

    def _refuse(self, option: str) -> NoReturn:
        name = option.removeprefix(f"--{_FIELD}")
        if not self._reads_fields or name == option:
            known = [each for each in self._known if not each.startswith(f"--{_FIELD}")]
            raise ValueError(f"there is no option {option}; {near(option, known, f'{self.prog} --help lists them.')}")
        if inside := [known for known in _kinds() if known.startswith(f"{name}.")]:
            raise ValueError(f"config: {name!r} is a section; expected its fields, such as --config.{inside[0]}=VALUE.")
        if name == "sweep_index":
            raise ValueError("--config.sweep_index takes a point of a sweep to draw; this word has none.")
        if "sweep_index" in near(name, [*_kinds(), "sweep_index"]):
            raise ValueError(f"config: there is no field {name!r}; did you mean 'sweep_index'?")
        raise ValueError(unknown_field(name))

    def add_config(self) -> None:
        """--config=FILE and every field of the configuration."""
        self._reads_fields = True
        self.add_argument(
            "--config", metavar="FILE", help="a file in configs/ (configs/base.py explains every field); or FILE:smoke"
        )
        for name, kind in _kinds().items():
            self.add_argument(f"--{_FIELD}{name}", type=reader(kind), help=argparse.SUPPRESS)


def config_file(found: argparse.Namespace) -> ConfigFile:
    """The config file of a command line, with the fields that it sets.

    Raises:
      ValueError: no file is named, or it cannot be used.
    """
    if not found.config:
        raise ValueError("expected --config=FILE, for instance --config=configs/digits.py; --help tells more.")
    given = {name: getattr(found, _FIELD + name) for name in _kinds()}
    return load(found.config, {name: value for name, value in given.items() if value is not None})


def add_sweep_index(parser: Parser) -> None:
    """--config.sweep_index."""
    parser.add_argument(f"--{_INDEX}", type=within(Count), metavar="I", help="this point of a sweep alone, from 0")


def sweep_index(found: argparse.Namespace) -> int | None:
    """--config.sweep_index, if given."""
    index: int | None = getattr(found, _INDEX)
    return index


def refuse_unused(found: argparse.Namespace, names: Iterable[str], why: str) -> None:
    """Nothing that was typed is silently without effect.

    Raises:
      ValueError: one of these options was typed; `why` it would change nothing.
    """
    for name in names:
        if f"--{name}" in found.typed:
            raise ValueError(f"--{name} has no effect here: {why}; leave it out.")


@functools.cache
def _kinds() -> dict[str, Any]:
    """The type of every field that is no section, by its dotted name."""

    def of(cls: Any, prefix: str) -> Iterable[tuple[str, Any]]:
        for field in fields(cls):
            if is_dataclass(field.type):
                yield from of(field.type, f"{prefix}{field.name}.")
            else:
                yield prefix + field.name, field.type

    return dict(of(Config, ""))


def reader(kind: Any) -> Callable[[str], Any]:
    """What reads a value of a field's type from text; it raises argparse.ArgumentTypeError."""
    kind, _ = taken_apart(kind)
    if typing.get_origin(kind) is tuple:
        item = reader(typing.get_args(kind)[0])
        return lambda text: tuple(item(_unquoted(part)) for part in _parts(text))
    if kind is bool:
        return _truth
    if kind is int:
        return whole
    return number if kind is float or float in typing.get_args(kind) else str


def within(kind: Any) -> Callable[[str], Any]:
    """What reads a number and looks at its range (`ranges`); it raises argparse.ArgumentTypeError."""
    bare, limits = taken_apart(kind)

    def read(text: str) -> Any:
        value = reader(bare)(text)
        if limits and (expected := limits.expected(value)):
            raise argparse.ArgumentTypeError(f"must be {expected}; got {text}")
        return value

    return read


def number(text: str) -> float:
    """A number or a fraction: 0.5, .5, 2e-3, 8/255."""
    above, slash, below = text.partition("/")
    try:
        parts = [float(above), float(below) if slash else 1.0]
        value = parts[0] / parts[1]
    except (ValueError, ZeroDivisionError):
        parts, value = [], math.nan
    if not all(map(math.isfinite, [*parts, value])):
        raise argparse.ArgumentTypeError(f"expected a number or a fraction such as 8/255; got {text!r}")
    return value


def whole(text: str) -> int:
    """A whole number."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number; got {text!r}") from None


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false; got {text!r}")
    return text.lower() == "true"


def _parts(text: str) -> list[str]:
    """The items of (a, b,), [a, b] or a,b."""
    text = text.strip()
    if text[:1] + text[-1:] in ("()", "[]"):
        text = text[1:-1]
    return [part.strip() for part in text.split(",") if part.strip()]


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text
