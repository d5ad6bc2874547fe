"""Thousands of damaged and hostile files of every kind; see tests/fuzzing.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzzing import KINDS

MUTATIONS = 5000
HALF = ("checkpoints", "trainings")  # together as many checkpoints
FEW = ("npys", "prepared", "replayed")  # read through the doors of the others


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_refused_in_a_sentence_or_fits(kind, tmp_path):
    """In a process of its own, which 2 GB of address space hold and no file keeps for 5 s."""
    mutations = MUTATIONS // 2 if kind in HALF else MUTATIONS // 5 if kind in FEW else MUTATIONS
    command = [sys.executable, "-m", "tests.fuzzing", kind, str(mutations), str(tmp_path)]
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])  # TFDS prints too
    assert not found["wrong"], found["wrong"][:3]
    assert found["refused"] + found["loaded"] == mutations
    assert found["refused"] > mutations // 3
    assert found["loaded"] > 0
