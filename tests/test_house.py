"""What holds of the whole house besides its floors, which import-linter checks (pyproject.toml)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import rst_jax

ROOT = Path(__file__).parent.parent


def test_importing_the_package_imports_nothing_heavy():
    """Names are there all the same, and each is found when it is asked for."""
    heavy = {"jax", "flax", "optax", "orbax", "numpy", "tensorflow_datasets", "torch", "matplotlib", "sklearn", "tqdm"}
    code = f"import sys, rst_jax; assert not {heavy} & set(sys.modules), sorted(sys.modules); print(dir(rst_jax))"
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert all(repr(name) in told for name in rst_jax.__all__)
    for name in rst_jax.__all__:
        assert getattr(rst_jax, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        rst_jax.nothing  # noqa: B018


def test_configs_import_only_ml_collections_and_the_config_that_they_start_from():
    for path in (ROOT / "configs").glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        found |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
        assert found <= {"ml_collections", "collections.abc", "configs"}, path.name


def test_no_room_needs_tensorflow_or_torch_to_be_imported():
    for path in (ROOT / "rst_jax").rglob("*.py"):
        top = {n.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import) for n in node.names}
        top |= {node.module or "" for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom)}
        heavy = {"tensorflow", "torch", "tensorflow_datasets", "sklearn", "matplotlib", "tensorboardX"}
        assert not {name.split(".")[0] for name in top} & heavy, path.name


def test_changelog_names_the_version():
    from rst_jax import __version__

    heading = next(line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## "))
    assert heading.split()[1] == __version__


def test_files_and_functions_fit_on_a_few_screens():
    """300 lines a file, 60 a function."""
    for path in sorted((ROOT / "rst_jax").rglob("*.py")):
        text = path.read_text()
        assert text.count("\n") <= 300, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 60, f"{path}: {node.name}"


def test_all_that_is_printed_goes_through_one_place():
    """So that no file's text moves a cursor."""
    for path in (ROOT / "rst_jax").rglob("*.py"):
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        prints = [call for call in map(ast.unparse, calls) if call in ("print", "sys.stdout.write", "sys.stderr.write")]
        assert len(prints) == (path.name == "text.py" and path.parent.name == "runtime"), path
