"""Text that others wrote: what may name a file, and what a terminal or a page is shown of it."""

import sys
import unicodedata
from typing import TextIO

_UNFIT = set('/\\:*?"<>|')  # in names, on one system or another
_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}
_LONGEST = 150  # bytes of a name


def plain(text: object) -> str:
    """On one line, with what moves a cursor, hides or turns text around written as escapes."""
    return "".join(c if _shows(c) else c.encode("unicode_escape").decode() for c in str(text))


def lines(text: object, encoding: str | None = "utf-8") -> str:
    """Each of its lines as `plain` has it, in what an encoding can show; all that rst_jax prints goes through here."""
    encoding = encoding or "utf-8"
    told = "\n".join(map(plain, str(text).split("\n")))
    return told.encode(encoding, "backslashreplace").decode(encoding)


def show(text: object, file: TextIO | None = None) -> None:
    """Print `lines` of a text, on standard output if no file is given."""
    file = file or sys.stdout
    print(lines(text, getattr(file, "encoding", None)), file=file, flush=True)


def check_name(name: str, of: str = "name") -> None:
    """Refuse what cannot name a file in whatever folder it is put.

    Raises:
      ValueError: no plain word or words.
    """
    fits = plain(name) == name and 0 < len(name.encode()) <= _LONGEST and not _UNFIT & set(name)
    if not fits or name[0] in ".- " or name[-1] in ". " or name.split(".")[0].lower() in _RESERVED:
        raise ValueError(f"{of} must be a plain word that can name a file; got {name[:_LONGEST]!r}.")


def _shows(character: str) -> bool:
    return character.isprintable() or unicodedata.category(character) == "Zs"
