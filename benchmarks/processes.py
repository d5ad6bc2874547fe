"""What several processes on this machine cost beside one process of as many devices, and whether they agree.

    python benchmarks/processes.py --processes 2 4

Runs the project's command on the digits with 20 and with 120 steps; the difference is 100 steps, without start,
compilation and evaluation. Takes turns, prints medians and the ratio, and the largest difference of any score after 20
steps relative to the largest score; writes benchmarks/results/processes.json.
"""

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from rst_jax.records import provenance
from rst_jax.runtime.files import write_json

ROOT = Path(__file__).parent.parent
STEPS = 100  # in five epochs of 1,280 images
OPTIONS = [
    "--config=configs/digits.py",
    "--config.stages=search,dense",
    "--config.remaining_ratios=(0.3,)",
    "--config.dense.train=False",
    "--config.train_examples=1280",
    "--config.evaluate.every_epochs=1000",
    "--config.checkpoint_every_epochs=1000",
    "--config.evaluate.steps=1",
]


def run(workdir: Path, processes: int, devices: int, epochs: int) -> float:
    """Seconds of the command on so many processes of so many devices each.

    Raises:
      RuntimeError: a process failed; its output.
    """
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    environment = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "cache"),
    }
    words = [sys.executable, "-m", "rst_jax.main", *OPTIONS, f"--config.epochs={epochs}", f"--workdir={workdir}"]
    start, started = time.perf_counter(), []
    for i in range(processes):
        join = [f"--coordinator={address}", f"--num_processes={processes}", f"--process_id={i}"]
        started.append(
            subprocess.Popen(
                words + join * (processes > 1),
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError("\n".join(outputs))
    return time.perf_counter() - start


def scores(workdir: Path) -> list[np.ndarray]:
    """The scores of the last checkpoint."""
    folder = next((workdir / "checkpoints" / "ratio-0.3" / "latest").iterdir()) / "state"
    with ocp.PyTreeCheckpointer() as checkpointer:
        saved: Any = checkpointer.metadata(folder)
        arrays = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved.item_metadata.tree)
        return jax.tree.leaves(checkpointer.restore(folder, restore_args=arrays)["scores"])


def main() -> None:
    """Parse, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "processes.json")
    args = parser.parse_args()
    rows = []
    for count in args.processes:
        shapes = {"one process": (1, count), "processes": (count, 1)}
        step_ms: dict[str, list[float]] = {name: [] for name in shapes}
        with tempfile.TemporaryDirectory() as folder:
            for turn in range(args.runs + 1):
                for name, shape in shapes.items():
                    short, long = (run(Path(folder) / f"{name}-{turn}-{e}", *shape, e) for e in (1, 6))
                    if turn:  # the first turn compiles
                        step_ms[name].append(1e3 * (long - short) / STEPS)
            found = [scores(Path(folder) / f"{name}-0-1") for name in shapes]
        apart = max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in zip(*found, strict=True))
        one, several = (statistics.median(step_ms[name]) for name in shapes)
        print(
            f"{count} devices: one process {one:.1f} ms a step, {count} processes {several:.1f} ms, "
            f"ratio {several / one:.2f}; scores after 20 steps differ by {apart:.1e}",
            flush=True,
        )
        rows.append({"devices": count, "milliseconds": step_ms, "ratio": several / one, "scores_apart": apart})
    write_json(args.out, {"measured": rows, "provenance": vars(provenance())})
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
