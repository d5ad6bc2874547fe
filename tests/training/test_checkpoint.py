import jax.numpy as jnp
import numpy as np
import pytest

from rst_jax.training.checkpoint import RunCheckpoints
from rst_jax.training.state import TicketState


def test_checkpoints_keep_the_latest_and_the_best(tmp_path):
    def state(step, value):
        tree = {"a": jnp.full(3, value)}
        return TicketState(jnp.int32(step), tree, tree, {}, (tree, jnp.int32(step)))

    store = RunCheckpoints(tmp_path / "run")
    assert store.restore_latest(state(0, 0.0)) is None
    for step in (1, 2, 3):
        store.save_latest(state(step, float(step)), {"best_step": 2})
    store.save_best(state(2, 2.0))
    store.save_best(state(5, 5.0))  # and then a kill, before a latest speaks of it
    store.close()
    store = RunCheckpoints(tmp_path / "run")
    latest, kept = store.restore_latest(state(0, 0.0))
    assert (int(latest.step), kept) == (3, {"best_step": 2})
    np.testing.assert_array_equal(latest.opt_state[0]["a"], np.full(3, 3.0))
    np.testing.assert_array_equal(store.restore_best(state(0, 0.0), 2).params["a"], np.full(3, 2.0))
    store.save_best(state(5, 5.5))  # the stretch was run again
    np.testing.assert_array_equal(store.restore_best(state(0, 0.0), 5).params["a"], np.full(3, 5.5))
    store.close()
    for file in (tmp_path / "run" / "latest").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"latest.3: this checkpoint cannot be read"):
        RunCheckpoints(tmp_path / "run").restore_latest(state(0, 0.0))
