"""The examples run, as a person runs them."""

import os
import shutil
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


@pytest.mark.slow
def test_an_attack_comes_into_the_command_by_one_file_and_one_line(tmp_path):
    shutil.copytree(ROOT / "rst_jax", tmp_path / "rst_jax", ignore=shutil.ignore_patterns("__pycache__"))
    attack, _, _ = (ROOT / "examples" / "own_attack.py").read_text().partition("def main()")
    (tmp_path / "rst_jax" / "attacks" / "shrinking.py").write_text(attack)
    suites = tmp_path / "rst_jax" / "evaluation" / "suites.py"
    table = "ATTACKS: dict[str, _Made] = {\n"
    assert table in suites.read_text()
    suites.write_text(suites.read_text().replace(table, table + '    "shrinking": _of("shrinking.Shrinking"),\n'))
    ticket = next((ROOT / "zoo").glob("digits-*-0.3-*.ticket"))
    asked = ["evaluate", str(ticket), "--dataset=digits", "--eps=0.12", "--attacks=shrinking,pgd-20", "--examples=20"]
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "rst_jax", *asked, "--out", str(tmp_path / "card")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Shrinking" in done.stdout
    wrong = [word.replace("=shrinking", "=shrinkin") for word in command]
    done = subprocess.run(wrong, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, "shrinking" in done.stderr) == (2, True)
