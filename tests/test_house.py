"""What holds of the whole house besides its floors, which import-linter checks (pyproject.toml)."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            found |= {f"{module}.{a.name}" for a in node.names} if module in ("rst_jax", "configs") else {module}
    return found


def test_configs_import_only_ml_collections_and_the_config_that_they_start_from():
    for path in (ROOT / "configs").glob("*.py"):
        others = {name for name in imports(path) if not name.startswith("configs.")}
        assert others <= {"ml_collections", "collections.abc"}, path.name


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
