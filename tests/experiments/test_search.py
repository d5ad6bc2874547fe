"""What a draw compiles, as a person starts it."""

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
    "--config.stages=('search',)",
    "--config.remaining_ratios=(0.3,0.5,0.7)",
    "--config.compilation_cache=",
)


@pytest.mark.slow
def test_another_ratio_compiles_nothing(tmp_path):
    asked = {"JAX_LOG_COMPILES": "1", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONUNBUFFERED": "1"}
    environment = {**os.environ, **asked, "PYTHONPATH": str(ROOT)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    command = [sys.executable, "-m", "rst_jax.main", *SMALL, f"--workdir={tmp_path / 'run'}"]
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "check": False}
    done = subprocess.run(command, cwd=ROOT, env=environment, **both)
    assert done.returncode == 0, done.stdout
    first, last = (re.search(f"ratio-{ratio}: .* on holdout at epoch", done.stdout) for ratio in (0.3, 0.7))
    compiled = [each.start() for each in re.finditer("Finished XLA compilation of", done.stdout)]
    assert len(compiled) > 5
    assert not [place for place in compiled if first.end() < place < last.end()]
