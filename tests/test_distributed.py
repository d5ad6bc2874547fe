"""Two real processes over jax.distributed on the CPU, against one process of two devices."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rst_jax.ticket import load_ticket

ROOT = Path(__file__).parent.parent
TINY = [
    "--config=configs/digits.py",
    "--config.remaining_ratios=(0.3,)",
    "--config.dense.train=False",
    "--config.epochs=1",
    "--config.train_examples=256",
    "--config.evaluate.steps=2",
    "--config.evaluate.examples=61",
]


def start(workdir, devices, *more):
    environment = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": "",
    }
    command = [sys.executable, "-m", "rst_jax.main", *TINY, f"--workdir={workdir}", *more]
    return subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
def test_two_processes_are_one_process_of_two_devices(tmp_path):
    one = start(tmp_path / "one", 2)
    out, _ = one.communicate(timeout=300)
    assert one.returncode == 0, out
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    two = [
        start(tmp_path / "two", 1, f"--coordinator=localhost:{port}", "--num_processes=2", f"--process_id={i}")
        for i in range(2)
    ]
    outs = [p.communicate(timeout=300)[0] for p in two]
    assert [p.returncode for p in two] == [0, 0], outs
    assert "report:" in outs[0]
    assert "report:" not in outs[1]
    tickets = [load_ticket(tmp_path / w / "tickets" / "ratio-0.3.ticket") for w in ("one", "two")]
    assert tickets[0].digest == tickets[1].digest
    assert tickets[0].meta == tickets[1].meta
    flags = [np.load(tmp_path / w / "results" / "flags" / "ratio-0.3.npz") for w in ("one", "two")]
    for name in ("natural", "robust", "violations"):
        np.testing.assert_array_equal(flags[0][name], flags[1][name])
    assert flags[0]["natural"].shape == (61,)
