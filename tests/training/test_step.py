import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rst_jax import subnet
from rst_jax.config import PGDSettings
from rst_jax.data.pipeline import Images
from rst_jax.evaluation.classifier import of_module
from rst_jax.evaluation.programs import Programs
from rst_jax.initializers import init_variables
from rst_jax.models.convnet import ConvNet
from rst_jax.models.resnet import ResNet
from rst_jax.runtime.mesh import make_mesh, replicate, split_rows
from rst_jax.threat import ThreatModel
from rst_jax.training.state import TicketState
from rst_jax.training.step import Settings, make_train_step, make_update
from rst_jax.training.target import Scores, Weights

N, BATCH = 24, 8
MODEL = ResNet(num_classes=10, blocks=(1,), widths=(4,), stem_stride=2)
SGD = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9))
SEARCH = Settings(Scores(), ThreatModel(0.1), PGDSettings(2, 0.05), crop_padding=1, flip=True)
KEY = np.asarray(jax.random.key_data(jax.random.key(5)))


def data():
    rng = np.random.default_rng(0)
    return Images.of(
        jnp.asarray(rng.integers(0, 256, (N, 8, 8, 1), np.uint8)),
        jnp.asarray(rng.integers(0, 10, N), jnp.int32),
        jnp.arange(N, dtype=jnp.int32),
        levels=255,
    )


def begin(trainable="scores"):
    v = init_variables(MODEL, (8, 8, 1), jax.random.key(0))
    return TicketState(jnp.int32(0), v["params"], v["scores"], v["batch_stats"], SGD.init(v[trainable]))


def host(tree):
    return jax.tree.map(np.array, tree)


def assert_equal(a, b, **tolerance):
    if tolerance:
        chex.assert_trees_all_close(a, b, **tolerance)
    else:
        chex.assert_trees_all_equal(a, b)


def run(mesh, steps, settings=SEARCH, ratio=0.5, rows=BATCH, step=None, selection=None, trainable="scores"):
    state = replicate(begin(trainable), mesh)
    step = step or make_train_step(MODEL, SGD, settings, mesh, batch_size=BATCH, rows=rows)
    if selection is None:
        selection = subnet.kept_counts(state.scores, ratio)
    order = replicate(jnp.arange(N, dtype=jnp.int32)[::-1], mesh)
    args = replicate((data(), selection), mesh)
    for i in range(steps):
        state, metrics = step(state, args[0], order, np.int32(i * BATCH % N), args[1], KEY, np.int32(1))
    return host(state), host(metrics), step


def test_a_search_moves_the_scores_and_leaves_the_weights_bit_identical():
    before = host(begin())
    after, metrics, _ = run(make_mesh(jax.devices()[:1]), 3)
    assert_equal(before.params, after.params)
    assert int(after.step) == 3
    assert float(metrics["count"]) == BATCH
    for a, b in zip(jax.tree.leaves(before.scores), jax.tree.leaves(after.scores), strict=True):
        assert (a != b).mean() > 0.9


def test_training_under_a_fixed_mask_moves_only_what_the_mask_keeps():
    mesh = make_mesh(jax.devices()[:1])
    state = begin("params")
    masks = subnet.masks(state.scores, subnet.kept_counts(state.scores, 0.5))
    settings = Settings(Weights(), ThreatModel(0.1), PGDSettings(1, 0.1))
    after, _, _ = run(mesh, 2, settings, selection=masks, trainable="params")
    assert_equal(host(state.scores), after.scores)
    for mask, a, b in zip(*map(jax.tree.leaves, (host(masks), host(state.params), after.params)), strict=True):
        np.testing.assert_array_equal(a[~mask], b[~mask])
        assert (a[mask] != b[mask]).mean() > 0.9


def test_dense_training_is_the_step_without_masks():
    settings = Settings(Weights(), ThreatModel(0.1), PGDSettings(1, 0.1))
    after, _, _ = run(make_mesh(jax.devices()[:1]), 2, settings, selection={}, trainable="params")
    moved = [(a != b).mean() for a, b in zip(*map(jax.tree.leaves, (host(begin().params), after.params)), strict=True)]
    assert min(moved) > 0.9


def test_the_running_statistics_move_at_every_forward():
    """PGD-2 and the step itself are three forwards: a constant batch leaves 1 - .9^3 of its statistics."""
    state = begin()
    images = jnp.full((4, 8, 8, 1), 0.5)
    labels = jnp.zeros(4, jnp.int32)
    kept = subnet.kept_counts(state.scores, 1.0)
    for mode, share in (("train", 1 - 0.9**3), ("eval", 0.1)):
        settings = Settings(Scores(), ThreatModel(0.0), PGDSettings(2, 0.0), batch_norm=mode)
        after, _ = jax.jit(make_update(MODEL, SGD, settings))(state, images, labels, None, kept)
        _, once = MODEL.apply(
            {"params": state.params, "batch_stats": state.batch_stats}, images, train=True, mutable=["batch_stats"]
        )
        mean = np.asarray(once["batch_stats"]["bn1"]["mean"]) / 0.1
        np.testing.assert_allclose(after.batch_stats["bn1"]["mean"], share * mean, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_four_devices_make_the_step_of_the_same_four_shards():
    """Against four single-device updates on the shards, their gradients averaged by hand through the optimiser."""
    settings = Settings(Scores(), ThreatModel(0.1), PGDSettings(2, 0.05))
    four, metrics, _ = run(make_mesh(), 1, settings)
    state = begin()
    kept = subnet.kept_counts(state.scores, 0.5)
    plain = optax.sgd(1.0)
    update = jax.jit(make_update(MODEL, plain, settings))
    bare = TicketState(state.step, state.params, state.scores, state.batch_stats, plain.init(state.scores))
    images = data()
    order = np.arange(N)[::-1]
    shards = []
    for d in range(4):
        x, y, ids = images.take(jnp.asarray(order[2 * d : 2 * d + 2]))
        step_key = jax.random.fold_in(jax.random.wrap_key_data(jnp.asarray(KEY)), 0)
        noise_keys = jax.vmap(lambda i, k=step_key: jax.random.split(jax.random.fold_in(k, i))[1])(ids)
        shards.append(update(bare, x, y, settings.threat.noise(noise_keys, x), kept))
    gradient = jax.tree.map(
        lambda old, *new: sum(old - n for n in new) / 4, state.scores, *(s.scores for s, _ in shards)
    )
    updates, _ = SGD.update(gradient, SGD.init(state.scores), state.scores)
    assert_equal(host(optax.apply_updates(state.scores, updates)), four.scores, rtol=1e-4, atol=1e-6)
    stats = jax.tree.map(lambda *s: sum(s) / 4, *(s.batch_stats for s, _ in shards))
    assert_equal(host(stats), four.batch_stats, rtol=1e-5, atol=1e-6)
    assert float(metrics["loss"]) == pytest.approx(sum(float(m["loss"]) for _, m in shards), rel=1e-5)


@pytest.mark.slow
def test_synchronised_statistics_make_four_devices_one():
    synced = ResNet(num_classes=10, blocks=(1,), widths=(4,), stem_stride=2, bn_axis="data")
    found = []
    for devices in (jax.devices()[:1], jax.devices()):
        mesh = make_mesh(devices)
        step = make_train_step(synced, SGD, SEARCH, mesh, batch_size=BATCH, rows=BATCH)
        found.append(run(mesh, 1, step=step)[0])
    assert_equal(found[0].scores, found[1].scores, rtol=1e-3, atol=1e-5)
    assert_equal(found[0].batch_stats, found[1].batch_stats, rtol=1e-4, atol=1e-5)


def test_accumulated_parts_make_the_gradient_of_the_whole_batch():
    """On a network without batch statistics, of which each part has its own."""
    model = ConvNet(num_classes=10, widths=(4,))
    v = init_variables(model, (8, 8, 1), jax.random.key(0))
    state = TicketState(jnp.int32(0), v["params"], v["scores"], v["batch_stats"], SGD.init(v["scores"]))
    kept = subnet.kept_counts(v["scores"], 0.5)
    images, labels, _ = data().take(jnp.arange(12))
    found = []
    for parts in (1, 3):
        settings = dataclasses.replace(SEARCH, accumulate=parts)
        found.append(jax.jit(make_update(model, SGD, settings))(state, images, labels, None, kept))
    assert_equal(host(found[0][0].scores), host(found[1][0].scores), rtol=1e-5, atol=1e-7)
    assert float(found[0][1]["loss"]) == pytest.approx(float(found[1][1]["loss"]), rel=1e-6)
    assert float(found[1][1]["count"]) == 12


def test_accumulated_parts_carry_the_statistics_on():
    """Two parts are two batches for the running statistics: of a constant one, 1 - .9^2 remains."""
    state = begin()
    images, labels = jnp.full((4, 8, 8, 1), 0.5), jnp.zeros(4, jnp.int32)
    kept = subnet.kept_counts(state.scores, 1.0)
    settings = Settings(Scores(), ThreatModel(0.0), PGDSettings(0, 0.0), accumulate=2)
    after, _ = jax.jit(make_update(MODEL, SGD, settings))(state, images, labels, None, kept)
    _, once = MODEL.apply(
        {"params": state.params, "batch_stats": state.batch_stats}, images, train=True, mutable=["batch_stats"]
    )
    mean = np.asarray(once["batch_stats"]["bn1"]["mean"]) / 0.1
    np.testing.assert_allclose(after.batch_stats["bn1"]["mean"], (1 - 0.9**2) * mean, rtol=1e-4, atol=1e-6)


def test_a_batch_that_cannot_be_accumulated_evenly_is_refused():
    with pytest.raises(ValueError, match="8 images a device cannot be accumulated in 3 equal parts"):
        make_train_step(
            MODEL,
            SGD,
            dataclasses.replace(SEARCH, accumulate=3),
            make_mesh(jax.devices()[:1]),
            batch_size=BATCH,
            rows=BATCH,
        )


def test_rematerialised_activations_change_nothing():
    found = []
    for remat in (False, True):
        model = ResNet(num_classes=10, blocks=(1,), widths=(4,), stem_stride=2, remat=remat)
        mesh = make_mesh(jax.devices()[:1])
        step = make_train_step(model, SGD, SEARCH, mesh, batch_size=BATCH, rows=BATCH)
        found.append(run(mesh, 2, step=step)[0])
    assert_equal(found[0].scores, found[1].scores, rtol=1e-5, atol=1e-7)
    assert_equal(found[0].batch_stats, found[1].batch_stats, rtol=1e-5, atol=1e-7)


def test_a_streamed_batch_is_the_batch_of_the_order():
    mesh = make_mesh()
    ordered, metrics, _ = run(mesh, 1)
    step = make_train_step(MODEL, SGD, SEARCH, mesh, batch_size=BATCH, rows=BATCH, streamed=True)
    index = np.arange(N)[::-1][:BATCH]
    batch = jax.tree.map(lambda x: split_rows(np.asarray(x)[index], mesh), data())
    state = replicate(begin(), mesh)
    kept = replicate(subnet.kept_counts(state.scores, 0.5), mesh)
    none = replicate(np.zeros(0, np.int32), mesh)
    state, streamed = step(state, batch, none, np.int32(0), kept, KEY, np.int32(1))
    assert_equal(ordered.scores, host(state.scores))
    assert_equal(metrics, host(streamed))


def test_a_step_moves_nothing_between_host_and_device():
    """Every argument lies on the devices already; what JAX would move by itself is an error."""
    mesh = make_mesh()
    step = make_train_step(MODEL, SGD, SEARCH, mesh, batch_size=BATCH, rows=BATCH)
    state = begin()
    args = (data(), jnp.arange(N, dtype=jnp.int32), np.int32(0), subnet.kept_counts(state.scores, 0.5), KEY)
    state, args = replicate((state, (*args, np.int32(1))), mesh)
    state, _ = step(state, *args)
    with jax.transfer_guard("disallow"):
        state, metrics = step(state, *args)
    assert np.isfinite(metrics["loss"])


def test_the_second_step_compiles_nothing_and_ratios_share_one_program():
    mesh = make_mesh()
    first, _, step = run(mesh, 3)
    assert step._cache_size() == 1
    other, _, _ = run(mesh, 2, ratio=0.2, step=step)
    assert step._cache_size() == 1
    assert (first.scores["conv1"]["kernel"] != other.scores["conv1"]["kernel"]).any()


def test_many_steps_in_one_dispatch_are_the_same_steps():
    mesh = make_mesh(jax.devices()[:1])
    singly, _, _ = run(mesh, 3)
    many = make_train_step(MODEL, SGD, SEARCH, mesh, batch_size=BATCH, rows=BATCH, many=True)
    state = replicate(begin(), mesh)
    kept = subnet.kept_counts(state.scores, 0.5)
    order = jnp.arange(N, dtype=jnp.int32)[::-1]
    state, metrics = many(state, data(), order, np.int32(0), kept, KEY, np.int32(3))
    assert_equal(singly.scores, host(state).scores, rtol=1e-4, atol=1e-6)
    assert float(metrics["count"]) == 3 * BATCH
    many(state, data(), order, np.int32(0), kept, KEY, np.int32(2))
    assert many._cache_size() == 1


def compiled(attack_steps):
    mesh = make_mesh()
    settings = Settings(Scores(), ThreatModel(0.1), PGDSettings(attack_steps, 0.05), unroll=True)
    step = make_train_step(MODEL, SGD, settings, mesh, batch_size=BATCH, rows=BATCH)
    state = begin()
    args = (state, data(), jnp.arange(N, dtype=jnp.int32), np.int32(0), subnet.kept_counts(state.scores, 0.5), KEY)
    return step.lower(*args, np.int32(1)).compile()


@pytest.mark.slow
def test_the_attack_has_no_collective_and_the_state_is_donated():
    """Ten more attack steps bring no collective; what there is reduces gradient, statistics and metrics once."""
    short, long = compiled(1), compiled(11)

    def collectives(program):
        kinds = r"= \S+ (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
        return re.findall(kinds, re.sub(r"\([^()]*\) (all-reduce)", r"X \1", program.as_text()))

    assert set(collectives(short)) == {"all-reduce"}
    assert len(collectives(short)) == len(collectives(long))
    assert "input_output_alias" in long.as_text().splitlines()[0]


def test_a_batch_that_the_devices_cannot_share_is_refused():
    with pytest.raises(ValueError, match="10 images cannot be split over 4 devices"):
        make_train_step(MODEL, SGD, SEARCH, make_mesh(), batch_size=10, rows=10)


def test_predictions_do_not_see_padding():
    variables = init_variables(MODEL, (8, 8, 1), jax.random.key(0))
    variables = {k: variables[k] for k in ("params", "batch_stats")}
    predict = Programs(make_mesh(), 8).predict(of_module(MODEL))
    images = np.random.default_rng(0).uniform(size=(8, 8, 8, 1)).astype(np.float32)
    poisoned = images.copy()
    poisoned[6:] = np.nan
    np.testing.assert_array_equal(predict(variables, images)[:6], predict(variables, poisoned)[:6])
