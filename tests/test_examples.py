"""The examples run, as a person runs them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("own_attack", ["Shrinking", "APGD-CE", "verdict: "]),
        ("own_classifier", ["logistic regression in JAX", "scikit-learn's", "verdict: trustworthy"]),
        ("own_module", ["ticket, ratio 0.3", "random mask, ratio 0.3"]),
    ],
)
def test_an_example_prints_what_it_promises(name, words, tmp_path):
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for word in words:
        assert word in done.stdout
    assert not list(tmp_path.iterdir())
