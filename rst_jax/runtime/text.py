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


def tell(text: object, file: TextIO | None = None) -> None:
    """Print it, line by line as `plain` has it; all that rst_jax prints goes through here.

    Args:
      text: of as many lines as it has.
      file: standard output if not given.
    """
    file = file or sys.stdout
    lines = "\n".join(map(plain, str(text).split("\n")))
    encoding = getattr(file, "encoding", None) or "utf-8"
    print(lines.encode(encoding, "backslashreplace").decode(encoding), file=file, flush=True)


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
