"""What a person sees while they wait: a bar on a terminal, lines with the seconds."""

import sys
import time
from collections.abc import Callable

from tqdm import tqdm

from rst_jax.runtime.mesh import is_main
from rst_jax.runtime.text import lines


def progress(total: int, initial: int, label: str, unit: str) -> tqdm:
    """A bar with rate and time left on a terminal, nothing elsewhere."""
    return tqdm(
        total=total,
        initial=initial,
        desc=label,
        unit=unit,
        disable=not (is_main() and sys.stderr.isatty()),
        dynamic_ncols=True,
        leave=False,
    )


Say = Callable[[str], None]


def make_say(active: bool = True) -> Say:
    """Prints a line for a person, with the seconds since now; nothing when not active."""
    start = time.monotonic()

    def say(text: str) -> None:
        if active:
            tqdm.write(lines(f"[{time.monotonic() - start:6.1f} s] {text}", sys.stdout.encoding), file=sys.stdout)
            sys.stdout.flush()

    return say
