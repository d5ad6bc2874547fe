"""What a run keeps of its training: JSON lines, and TensorBoard events that are made from them.

Training metrics are sums over examples (loss, correct, count), so that they add up over steps and devices.
"""

import contextlib
import json
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rst_jax.runtime.files import make_folder, no_link, read_lines, whole, write_text


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
        """Start or resume a run at `step`; what a killed process wrote beyond it is dropped."""
        if not self.active:
            return
        kept = [row for row in read_lines(self.path) if row["run"] != run or row["step"] <= step]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        if self.path.exists() and self.path.read_text() != text:
            write_text(self.path, text)
        self.close()
        self._begin_events(self._events_dir / run, [row for row in kept if row["run"] == run])

    def _begin_events(self, folder: Path, rows: list[dict[str, Any]]) -> None:
        """One file of all rows in place of those that are there: no point is lost, none is there twice."""
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # slow to import
        from tensorboardX.record_writer import RecordWriter

        before = list(folder.glob("events.out.tfevents.*"))
        times = {
            (value.tag, e.step): e.wall_time for path in before for e in _events(path) for value in e.summary.value
        }
        path = folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"
        with whole(path) as temporary:
            self._events = RecordWriter(str(temporary))
            for first in (Event(file_version="brain.Event:2"), Event(session_log=SessionLog(status=SessionLog.START))):
                first.wall_time = time.time()
                self._events.write(first.SerializeToString())
            for row in rows:
                self._add(row, times)
            self._events.flush()
        for path in before:
            path.unlink()

    def _add(self, row: Mapping[str, Any], times: Mapping[tuple[str, int], float]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        for name, value in row.items():
            if name not in ("run", "step"):
                when = times.get((name, row["step"]), time.time())
                event = Event(wall_time=when, step=row["step"], summary=scalar(name, value))
                self._events.write(event.SerializeToString())

    def write(self, run: str, step: int, values: dict[str, float]) -> None:
        """One row."""
        if not self.active:
            return
        make_folder(self.path.parent)
        row = {"run": run, "step": step, **values}
        with open(self.path, "a", opener=no_link) as file:
            file.write(json.dumps(row) + "\n")
        if self._events is not None:
            self._add(row, {})

    def flush(self) -> None:
        """Bring the events to the disk, so that a kill after this loses none."""
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        """Flush and close the event file."""
        if self._events is not None:
            events, self._events = self._events, None
            events.close()


def _events(path: Path) -> Iterator[Any]:
    """The events of a file, up to one that is cut off or damaged."""
    from google.protobuf.message import DecodeError
    from tensorboardX.proto.event_pb2 import Event

    content, place = path.read_bytes(), 0
    with contextlib.suppress(DecodeError, struct.error):
        while place < len(content):
            (size,) = struct.unpack_from("<Q", content, place)  # and its checksum, the event, and its checksum
            yield Event.FromString(content[place + 12 : place + 12 + size])
            place += 12 + size + 4
