"""The floor plan: a module imports only from lower floors, or from modules named in its line."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLOORS = {
    "version": 0, "config": 0, "records": 0, "claims": 0, "chips": 0, "hlo": 0, "arrays": 0,
    "subnet": 1, "initializers": 1, "threat": 1, "losses": 1, "operations": 1, "text": 1,
    "models": 2, "attacks": 2, "data": 2, "mesh": 2, "preemption": 2,
    "state": 3, "metrics": 3, "programs": 3,
    "step": 4, "checkpoint": 4, "ticket": 4,
    "evidence": 3, "driver": 4,
    "loop": 5, "evaluator": 5, "checks": 5, "rows": 5, "subject": 5, "card_table": 5,
    "run": 6, "search": 6, "transfer": 6, "r2s": 6, "interop": 6, "card": 6, "page": 6,
    "report": 7, "card_page": 7, "commands": 7, "plan": 7, "main": 7, "__main__": 7,
}  # fmt: skip
ALSO = {
    "records": {"version"},
    "initializers": {"subnet"},
    "search": {"run", "r2s"},
    "r2s": {"transfer"},
    "report": {"card_page"},
    "commands": {"card_page"},
    "main": {"report", "plan", "commands"},
    "__main__": {"main"},
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            found |= {f"{module}.{a.name}" for a in node.names} if module in ("rst_jax", "configs") else {module}
    return found


def room(name: str) -> str:
    return name.split(".")[1]


def test_rooms_import_from_lower_floors():
    files = sorted((ROOT / "rst_jax").rglob("*.py"))
    seen = set()
    for path in files:
        parts = path.relative_to(ROOT / "rst_jax").with_suffix("").parts
        if parts == ("__init__",):
            continue
        here = parts[0]
        seen.add(here)
        for name in imports(path):
            if name.startswith("rst_jax.") and (there := room(name)) != here:
                allowed = FLOORS[there] < FLOORS[here] or there in ALSO.get(here, ())
                assert allowed, (
                    f"{path.relative_to(ROOT)} (floor {FLOORS[here]}) imports {name} (floor {FLOORS[there]})"
                )
    assert seen == set(FLOORS)


def test_configs_import_only_ml_collections_and_their_base():
    for path in (ROOT / "configs").glob("*.py"):
        assert imports(path) <= {"ml_collections", "configs.base"}, path.name


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
