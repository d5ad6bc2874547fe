"""Thousands of damaged and hostile files of every kind; see tests/fuzzing.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzzing import KINDS

MUTATIONS = 5000


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_refused_in_a_sentence_or_fits(kind, tmp_path):
    """In a process of its own, which 2 GB of address space hold and no file keeps for 5 s."""
    command = [sys.executable, "-m", "tests.fuzzing", kind, str(MUTATIONS), str(tmp_path)]
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])  # TFDS prints too
    assert not found["wrong"], found["wrong"][:3]
    assert found["refused"] + found["loaded"] == MUTATIONS
    assert found["refused"] > MUTATIONS // 3
    assert found["loaded"] > 0
