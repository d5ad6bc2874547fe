import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rst_jax.runtime.mesh import fetch, from_main, is_main, make_mesh, make_tree, replicate, split_rows


def test_replicated_and_split_arrays_come_back_whole():
    mesh = make_mesh()
    assert mesh.size == 4
    x = np.arange(8.0).reshape(8, 1)
    everywhere, rows = replicate({"x": x}, mesh), split_rows(x, mesh)
    assert len(everywhere["x"].addressable_shards) == len(rows.addressable_shards) == 4
    assert all(s.data.shape == (8, 1) for s in everywhere["x"].addressable_shards)
    assert all(s.data.shape == (2, 1) for s in rows.addressable_shards)
    np.testing.assert_array_equal(fetch(everywhere)["x"], x)
    np.testing.assert_array_equal(fetch(rows), x)
    assert replicate(everywhere, mesh)["x"] is everywhere["x"]


def test_one_process_is_the_main_one_and_agrees_with_itself():
    assert is_main()
    tree = {"a": np.arange(3)}
    assert from_main(tree) is tree
    assert fetch(jnp.ones(2)).sum() == 2
    assert make_mesh(jax.devices()[:2]).size == 2


@pytest.mark.parametrize(
    ("flags", "first", "expected"),
    [
        ("", "", 2 if (os.cpu_count() or 1) > 1 else 1),
        ("--xla_force_host_platform_device_count=3", "", 3),  # somebody has settled it
        ("", "jax.devices()", 1),  # too late
    ],
)
def test_a_cpu_of_several_cores_becomes_two_devices(flags, first, expected):
    code = f"import jax; {first}\nfrom rst_jax.runtime.mesh import split_cpu; split_cpu(); print(len(jax.devices()))"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert int(told.stdout) == expected


@pytest.mark.parametrize("devices", [1, 4])
def test_a_tree_is_made_by_rows_and_no_two_of_its_arrays_share_memory(devices):
    mesh, host = make_mesh(jax.devices()[:devices]), np.arange(512, dtype=np.float32).reshape(8, 64)
    made = []

    def rows(part):
        made.append(part)
        return {"once": host[part], "twice": (host[part], host[part]), "number": np.arange(8, dtype=np.int32)[part]}

    tree = make_tree(8, rows, mesh)
    assert len(made) == devices
    np.testing.assert_array_equal(fetch(tree)["number"], range(8))
    change = jax.jit(lambda a, b, c: (a + 1, b + 2, c + 3), donate_argnums=(0, 1, 2))
    changed = change(tree["once"], *tree["twice"])
    for k, array in enumerate(changed, 1):
        np.testing.assert_array_equal(array, np.arange(512).reshape(8, 64) + k)
    np.testing.assert_array_equal(host, np.arange(512).reshape(8, 64))
