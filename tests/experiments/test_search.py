"""What a draw compiles, as a person starts it."""

import collections
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SMALL = (
    "--config=configs/digits_patterns.py:smoke",
    "--config.sweep_index=0",
    "--config.stages=('search','evaluate')",
    "--config.compilation_cache=",
)


def compiled(workdir, ratios):
    """How often each program was compiled in a draw of so many ratios."""
    environment = {
        **os.environ,
        "JAX_LOG_COMPILES": "1",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "PYTHONPATH": str(ROOT),
    }
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    command = [
        sys.executable,
        "-m",
        "rst_jax.main",
        *SMALL,
        f"--config.remaining_ratios={ratios}",
        f"--workdir={workdir}",
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = collections.Counter(re.findall(r"Finished XLA compilation of (\S+)", done.stderr))
    assert found["jit(steps)"] == 1
    return found


@pytest.mark.slow
def test_another_ratio_compiles_nothing(tmp_path):
    assert compiled(tmp_path / "one", "(0.3,)") == compiled(tmp_path / "three", "(0.3,0.5,0.7)")
