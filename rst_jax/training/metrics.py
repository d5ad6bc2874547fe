"""What a run says while it works: JSON lines, TensorBoard events, a progress bar.

Training metrics are sums over examples (loss, correct, count), so that they add up over steps and devices.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rst_jax.records import write_text
from rst_jax.runtime.mesh import is_main


def means(sums: dict[str, Any]) -> dict[str, float]:
    """Loss and adversarial accuracy of the summed examples."""
    count = max(float(sums["count"]), 1.0)
    return {"loss": float(sums["loss"]) / count, "adversarial_accuracy": float(sums["correct"]) / count}


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


class MetricsWriter:
    """Appends rows {"run", "step", ...} to metrics.jsonl and scalars to TensorBoard; silent where it may not write.

    Args:
      workdir: holds metrics.jsonl and tensorboard/.
      active: False on all processes but the first.
    """

    def __init__(self, workdir: Path, active: bool = True):
        self.path, self.active = workdir / "metrics.jsonl", active
        self._events_dir = workdir / "tensorboard"
        self._events: Any = None

    def begin(self, run: str, step: int) -> None:
        """Start or resume a run at `step`; rows that a killed process wrote beyond it are dropped."""
        if not self.active:
            return
        kept = [row for row in read_lines(self.path) if row["run"] != run or row["step"] <= step]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        if self.path.exists() and self.path.read_text() != text:
            write_text(self.path, text)
        self.close()
        from tensorboardX import SummaryWriter  # slow to import

        self._events = SummaryWriter(str(self._events_dir / run), purge_step=step + 1)

    def write(self, run: str, step: int, values: dict[str, float]) -> None:
        """One row."""
        if not self.active:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps({"run": run, "step": step, **values}) + "\n")
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    def flush(self) -> None:
        """Bring the events to the disk, so that a kill after this loses none."""
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        """Flush and close the event file."""
        if self._events is not None:
            self._events.close()
            self._events = None


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
            tqdm.write(f"[{time.monotonic() - start:6.1f} s] {text}", file=sys.stdout)
            sys.stdout.flush()

    return say
