import contextlib
import json

import jax
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
    with pytest.raises(ValueError, match=r"latest.3: this checkpoint cannot be used"):
        RunCheckpoints(tmp_path / "run").restore_latest(state(0, 0.0))


def flipped(folder, rng):
    """One bit of one of the files of arrays below a folder, drawn by their sizes."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.stat().st_size]
    sizes = np.array([file.stat().st_size for file in files], float)
    file = files[rng.choice(len(files), p=sizes / sizes.sum())]
    raw = bytearray(file.read_bytes())
    raw[rng.integers(len(raw))] ^= 1 << rng.integers(8)
    file.write_bytes(raw)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax leaves a coroutine behind
@pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning")
@pytest.mark.parametrize("which", ["latest", "best"])
def test_a_flipped_bit_leads_back_to_the_checkpoint_before(tmp_path, which):
    def state(step):
        noise = np.random.default_rng(step).standard_normal((40, 50)).astype(np.float32)
        tree = {"a": jnp.asarray(noise)}
        return TicketState(jnp.int32(step), tree, tree, {}, (tree, jnp.int32(step)))

    def progress(step):
        return {"best_step": step, "pending": [], "epoch": step}

    def filled(folder):
        store = RunCheckpoints(folder)
        for step in (1, 2, 3):
            store.save_best(state(step))
            store.save_latest(state(step), progress(step))
        store.close()

    back = 0
    for seed in range(12):
        filled(tmp_path / str(seed))
        flipped(tmp_path / str(seed) / which / "3", np.random.default_rng(seed))
        told = []
        store = RunCheckpoints(tmp_path / str(seed), told.append)
        latest, kept = store.restore_latest(state(0))
        step = int(latest.step)
        assert kept == progress(step)
        for now in (latest, store.restore_best(state(0), step)):  # whatever it is, it is that
            jax.tree.map(np.testing.assert_array_equal, now, state(step))
        back += step == 2
        assert len(told) == (step == 2)
        assert all(f"{which}/3: this checkpoint cannot be used" in text and "of step 2" in text for text in told)
        if step == 2:  # the stretch is run again
            store.save_best(state(3))
            store.save_latest(state(3), progress(3))
        assert int(store.restore_latest(state(0))[0].step) == 3
        store.close()
    assert back >= 6  # the others hit what Orbax does not read


def test_a_checkpoint_without_a_digest_is_that_of_an_older_version(tmp_path):
    tree = {"a": jnp.ones(3)}
    state = TicketState(jnp.int32(1), tree, tree, {}, ())
    store = RunCheckpoints(tmp_path)
    store.save_best(state)
    store.close()
    told = tmp_path / "best" / "1" / "_CHECKPOINT_METADATA"
    whole = json.loads(told.read_text())
    for metadata in ({}, {"digest": "another"}):
        told.write_text(json.dumps(whole | {"custom_metadata": metadata}))
        store = RunCheckpoints(tmp_path)
        with pytest.raises(ValueError, match="it is not what was saved") if metadata else contextlib.nullcontext():
            assert int(store.restore_best(state, 1).step) == 1
        store.close()
