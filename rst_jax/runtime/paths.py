"""Paths that people write."""

import re
from pathlib import Path


def local_path(written: str | Path) -> Path:
    """The path, with ~ as the home of a user.

    Raises:
      ValueError: there is no such home, or it is the address of a storage that is no file system.
    """
    path = Path(written)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/" + "/" * isinstance(written, str), str(written)):
        raise ValueError(
            f"{written}: expected a path of this machine's file systems; mount such storage (a bucket: gcsfuse) and "
            "name the folder."
        )
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError(f"{written}: nobody knows the home folder {path.parts[0]}; write the whole path.") from None
