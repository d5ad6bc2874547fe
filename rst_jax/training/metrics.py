"""What a run keeps of its training: JSON lines and TensorBoard events.

Training metrics are sums over examples (loss, correct, count), so that they add up over steps and devices.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rst_jax.runtime.files import read_lines, write_text


def means(sums: Mapping[str, float]) -> dict[str, float]:
    """Loss and adversarial accuracy of the summed examples."""
    count = max(float(sums["count"]), 1.0)
    return {"loss": float(sums["loss"]) / count, "adversarial_accuracy": float(sums["correct"]) / count}


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
