"""Four fake CPU devices, strict dtype promotion, and shapes checked where functions name them, for every test."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from jaxtyping import install_import_hook

import tests.checking  # noqa: F401  (the hook finds it by name)

jax.config.update("jax_numpy_dtype_promotion", "strict")
# Of these rooms every call is checked against its annotations; the hook must come before they are imported.
ROOMS = (
    "losses",
    "threat",
    "subnet",
    "initializers",
    "models",
    "data.pipeline",
    "attacks",
    "training",
    "planning",
    "interop",
)
install_import_hook([f"rst_jax.{room}" for room in ROOMS], "tests.checking.checked")
