"""Four fake CPU devices, strict dtype promotion, and shapes checked where functions name them, for every test."""

import os
from collections import Counter
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from jaxtyping import install_import_hook

import tests.checking  # noqa: F401  (the hook finds it by name)

jax.config.update("jax_numpy_dtype_promotion", "strict")
# Of these rooms every call is checked against its annotations; the hook must come before they are imported.
ROOMS = ["losses", "threat", "subnet", "initializers", "data.pipeline", "attacks", "training", "planning", "interop"]
ROOMS += [f"models.{path.stem}" for path in (Path(__file__).parents[1] / "rst_jax" / "models").glob("[!_]*.py")]
install_import_hook([f"rst_jax.{room}" for room in ROOMS], "tests.checking.checked")


def pytest_collection_modifyitems(items):
    """Files with slow tests first, so that at the end no process waits for another."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])
