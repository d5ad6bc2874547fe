"""Devices and processes: one mesh axis, "data"; state is replicated over it, batches are split."""

import contextlib
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

AXIS = "data"


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh of all devices of all processes (or of those given), in one axis."""
    return Mesh(np.asarray(devices if devices is not None else jax.devices()), (AXIS,))


def split_cpu() -> None:
    """Make two devices of a CPU with several cores, unless XLA_FLAGS or an earlier use of JAX have settled it.

    The kernels of small programs do not fill a second core; so each half of a batch has its own.
    """
    settled = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if (os.cpu_count() or 1) > 1 and not settled:
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", 2)


def on_cpu(mesh: Mesh) -> bool:
    """Whether the mesh is of CPU devices, where loops inside a program are slow and half precision brings nothing."""
    return mesh.devices.flat[0].platform == "cpu"


def on_gpu(mesh: Mesh) -> bool:
    """Whether the mesh is of GPUs."""
    return mesh.devices.flat[0].platform in ("gpu", "cuda", "rocm")


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Arrays that every process holds alike, as global arrays on every device."""
    sharding = NamedSharding(mesh, PartitionSpec())

    def put(leaf: jax.typing.ArrayLike) -> jax.Array:
        if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
            return leaf
        if jax.process_count() == 1:
            return jax.device_put(leaf, sharding)
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree)


def make_rows(shape: tuple[int, ...], rows: Callable[[slice], np.ndarray], mesh: Mesh) -> jax.Array:
    """A global array [N, ...] split over the devices by rows; each process makes those of its own devices."""
    sharding = NamedSharding(mesh, PartitionSpec(AXIS))

    def of_device(index: Any) -> np.ndarray:
        return rows(index[0])

    return jax.make_array_from_callback(shape, sharding, of_device)


def split_rows(rows: np.ndarray, mesh: Mesh) -> jax.Array:
    """A host array [N, ...] that every process holds, as a global array split over the devices by rows."""
    return make_rows(rows.shape, lambda index: rows[index], mesh)


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="rows")


def make_tree(n: int, rows: Callable[[slice], PyTree], mesh: Mesh) -> PyTree:
    """As `make_rows`, a tree of arrays [n, ...] that are made together."""
    places: Any = NamedSharding(mesh, PartitionSpec(AXIS)).addressable_devices_indices_map((n,)).values()
    made = _threads().map(lambda index: rows(*index), places)
    parts = {part.start: tree for (part,), tree in zip(places, made, strict=True)}
    leaves = {start: jax.tree.leaves(tree) for start, tree in parts.items()}
    some = next(iter(parts.values()))

    def whole(number: int, leaf: np.ndarray) -> jax.Array:  # of copies: no two share memory, and each can be given up
        return make_rows((n, *leaf.shape[1:]), lambda part: np.array(leaves[part.start][number]), mesh)

    arrays = [whole(number, leaf) for number, leaf in enumerate(jax.tree.leaves(some))]
    return jax.tree.unflatten(jax.tree.structure(some), arrays)


def fetch(tree: PyTree) -> PyTree:
    """Global arrays, replicated or split by rows, as whole NumPy arrays on every process."""

    def get(leaf: jax.typing.ArrayLike) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
        return np.asarray(leaf)

    return jax.tree.map(get, tree)


def from_main(tree: PyTree) -> PyTree:
    """What the first process holds, on all of them: arrays of the same shapes everywhere. They wait for one another.

    What depends on files must go through here, since processes may see a file at different times.
    """
    if jax.process_count() == 1:
        return tree
    return jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(tree))


def on_main(action: Callable[[], None]) -> None:
    """Run it in the first process alone; where that is refused (ValueError, OSError), all processes raise."""
    refusal: Exception | None = None
    if is_main():
        try:
            action()
        except (ValueError, OSError) as error:
            refusal = error
    if from_main(np.asarray(refusal is not None)):
        raise refusal or ValueError("the first process was refused; it says why.")


def is_main() -> bool:
    """Whether this process is the one that writes files and talks to people."""
    return jax.process_index() == 0
