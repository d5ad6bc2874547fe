import jax
import numpy as np
import pytest

import rst_jax
from rst_jax import subnet
from rst_jax.checkpoint import RunCheckpoints
from rst_jax.models import make_model
from rst_jax.r2s import R2S, expected_accuracy, load_r2s, r2s_record, save_r2s
from rst_jax.state import init_variables
from rst_jax.ticket import Ticket, load_ticket
from rst_jax.transfer import Crossed

SPEC = {"name": "resnet_digits", "num_classes": 10, "mean": [0.3], "std": [0.4]}
IMAGES = np.random.default_rng(0).uniform(size=(5, 8, 8, 1)).astype(np.float32)


def draw(ratio=0.1, seed=0, weight_init="signed_kaiming_constant", pattern="element"):
    model = make_model("resnet_digits", 10, (0.3,), (0.4,))
    v = init_variables(model, (8, 8, 1), jax.random.key(seed), weight_init=weight_init, pattern=pattern)
    masks = subnet.masks(v["scores"], subnet.kept_counts(v["scores"], ratio))
    stats = jax.tree.map(lambda s: s + 0.1 * ratio, v["batch_stats"])
    meta = {"name": f"ratio-{ratio:g}", "selection_robust": ratio}
    return Ticket.make(SPEC, (8, 8, 1), ratio, v["params"], masks, stats, meta), v


@pytest.fixture(scope="module")
def drawn():
    return [draw(r)[0] for r in (0.1, 0.3)]


@pytest.mark.parametrize(("init", "pattern"), [("signed_kaiming_constant", "element"), ("kaiming_normal", "row")])
def test_a_ticket_file_round_trips_bit_by_bit(tmp_path, init, pattern):
    ticket, _ = draw(weight_init=init, pattern=pattern)
    path = tmp_path / "a.ticket"
    ticket.save(path)
    again = rst_jax.load_ticket(path)
    assert again.digest == ticket.digest
    assert (again.model, again.image_shape, again.meta) == (ticket.model, ticket.image_shape, ticket.meta)
    for a, b in zip(*(jax.tree.leaves((t.weights, t.masks, t.batch_stats)) for t in (ticket, again)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype
    np.testing.assert_array_equal(ticket(IMAGES), again(IMAGES))
    kept, total = again.weight_counts
    assert total == 152_768
    assert kept == sum(int((w != 0).sum()) for w in jax.tree.leaves(subnet.kernels(again.weights)))
    if init == "signed_kaiming_constant":
        assert path.stat().st_size < 60_000  # two bits a weight and a little
    assert [p.name for p in tmp_path.iterdir()] == ["a.ticket"]


def test_a_dense_network_is_a_ticket_without_masks(tmp_path):
    _, v = draw()
    dense = Ticket.make(SPEC, (8, 8, 1), 1.0, v["params"], {}, v["batch_stats"], {})
    dense.save(tmp_path / "d.ticket")
    again = load_ticket(tmp_path / "d.ticket")
    assert again.weight_counts == (152_768, 152_768)
    np.testing.assert_array_equal(dense(IMAGES), again(IMAGES))


def test_a_ticket_is_the_masked_module(drawn):
    ticket, v = draw()
    masks = subnet.masks(v["scores"], subnet.kept_counts(v["scores"], 0.1))
    variables = {"params": subnet.apply_masks(v["params"], masks), "batch_stats": ticket.batch_stats}
    module = make_model("resnet_digits", 10, (0.3,), (0.4,))
    np.testing.assert_allclose(ticket(IMAGES), module.apply(variables, IMAGES, train=False), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (IMAGES * 255, r"lie in \[0, 1\]"),
        ((IMAGES * 255).astype(np.uint8), "floats"),
        (IMAGES[..., 0], r"\[N, 8, 8, 1\]"),
        (IMAGES[:, :7], r"\[N, 8, 8, 1\]"),
        (np.full_like(IMAGES, np.nan), r"lie in \[0, 1\]"),
    ],
)
def test_wrong_images_are_refused(drawn, images, words):
    with pytest.raises(ValueError, match=words):
        drawn[0](images)


def test_a_broken_ticket_is_named_and_left_alone(tmp_path, drawn):
    path = tmp_path / "a.ticket"
    drawn[0].save(path)
    whole = path.read_bytes()
    for damage in (b"", whole[:1000], b"junk" * 100):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match=r"a\.ticket: this is not a readable ticket"):
            load_ticket(path)
        assert path.read_bytes() == damage
    with pytest.raises(ValueError, match="no such ticket"):
        load_ticket(tmp_path / "none.ticket")
    with np.load(__file__.replace("test_ticket.py", "data/official_row.npz")) as other:
        np.savez(path.with_suffix(".npz"), images=other["images"])
    with pytest.raises(ValueError, match="not a readable ticket"):
        load_ticket(path.with_suffix(".npz"))


def test_a_ticket_with_changed_content_is_damaged(tmp_path, drawn):
    path = tmp_path / "a.ticket"
    drawn[0].save(path)
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    arrays["stats/bn1/mean"] = arrays["stats/bn1/mean"] + 1
    with path.open("wb") as file:
        np.savez(file, **arrays)
    with pytest.raises(ValueError, match="damaged"):
        load_ticket(path)


def test_r2s_gives_every_image_the_logits_of_the_ticket_drawn_for_it(drawn):
    defence = R2S(drawn)
    images = np.repeat(IMAGES, 8, axis=0)
    logits = np.stack([t(images) for t in drawn])
    draws = np.asarray(defence.draw(jax.random.key(3), 40))
    np.testing.assert_array_equal(defence(images, jax.random.key(3)), logits[draws, np.arange(40)])
    assert set(draws) == {0, 1}
    assert (np.asarray(defence.draw(jax.random.key(4), 40)) != draws).any()
    jitted = jax.jit(lambda x, k: defence(x, k))
    np.testing.assert_allclose(jitted(images, jax.random.key(3)), logits[draws, np.arange(40)], rtol=1e-5, atol=1e-6)
    for key in (5, 6):  # a key closed over at the first trace would freeze the draw
        expected = logits[np.asarray(defence.draw(jax.random.key(key), 40)), np.arange(40)]
        np.testing.assert_allclose(jitted(images, jax.random.key(key)), expected, rtol=1e-5, atol=1e-6)


def test_r2s_draws_by_its_probabilities(drawn):
    draws = np.asarray(R2S(drawn, [0.8, 0.2]).draw(jax.random.key(0), 4000))
    assert np.mean(draws == 0) == pytest.approx(0.8, abs=0.03)
    assert not np.asarray(R2S(drawn, [1.0, 0.0]).draw(jax.random.key(0), 100)).any()


def test_r2s_refuses_what_cannot_be_switched(drawn):
    with pytest.raises(ValueError, match="at least one"):
        R2S([])
    with pytest.raises(ValueError, match="sum to 1"):
        R2S(drawn, [0.5, 0.6])
    with pytest.raises(ValueError, match="2 numbers"):
        R2S(drawn, [1.0])
    other = Ticket({**SPEC, "mean": [0.5]}, (8, 8, 1), 0.1, drawn[0].weights, {}, drawn[0].batch_stats)
    with pytest.raises(ValueError, match="one network"):
        R2S([drawn[0], other])


def test_r2s_from_the_checkpoint_is_the_tickets(tmp_path, drawn):
    _, v = draw()
    save_r2s(tmp_path / "tickets", v["params"], drawn)
    save_r2s(tmp_path / "tickets", v["params"], drawn[::-1])  # written anew
    defence = load_r2s(tmp_path / "tickets")
    assert [t.digest for t in defence.tickets] == [t.digest for t in drawn]
    np.testing.assert_array_equal(defence(IMAGES, jax.random.key(0)), R2S(drawn)(IMAGES, jax.random.key(0)))
    packed = sum(p.stat().st_size for p in (tmp_path / "tickets").rglob("*") if p.is_file())
    assert packed < 4 * 152_768 * 1.2  # the weights once; two masks of a bit a weight
    with pytest.raises(ValueError, match="no checkpoint of tickets"):
        load_r2s(tmp_path / "none")
    for file in (tmp_path / "tickets").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be read"):
        load_r2s(tmp_path / "tickets")


def crossed(k, n, seed=0):
    rng = np.random.default_rng(seed)
    return Crossed(rng.random((k, n)) < 0.9, rng.random((k, k, n)) < 0.6, [0] * k)


class FakeEvaluator:
    attack_record = None


def test_r2s_is_exact_by_enumeration(drawn):
    flags = crossed(2, 50)
    p = np.array([0.3, 0.7])
    record = r2s_record(flags, drawn, p, FakeEvaluator())
    by_hand = sum(p[s] * p[k] * flags.robust[s, k].mean() for s in (0, 1) for k in (0, 1))
    assert record.transfer_only == pytest.approx(by_hand)
    assert record.natural == pytest.approx(0.3 * flags.natural[0].mean() + 0.7 * flags.natural[1].mean())
    worst = np.mean([min(sum(p[k] * flags.robust[s, k, n] for k in (0, 1)) for s in (0, 1)) for n in range(50)])
    assert record.worst_of_pool == pytest.approx(worst)
    breakable = np.max([p[k] * ~flags.robust[k, k] for k in (0, 1)], axis=0)
    assert record.worst_of_pool <= np.mean(1 - breakable) + 1e-12


def test_copies_of_one_ticket_and_certain_draws_are_that_ticket(drawn):
    one = crossed(1, 80)
    copies = Crossed(np.repeat(one.natural, 3, 0), np.broadcast_to(one.robust, (3, 3, 80)), [0] * 3)
    record = r2s_record(copies, [drawn[0]] * 3, np.full(3, 1 / 3), FakeEvaluator())
    single = one.robust[0, 0].mean()
    for value in (record.transfer_only, record.worst_of_pool, record.best_single):
        assert value == pytest.approx(single)
    two = crossed(2, 80)
    sure = r2s_record(two, drawn, np.array([0.0, 1.0]), FakeEvaluator())
    assert sure.natural == pytest.approx(two.natural[1].mean())
    assert sure.transfer_only == pytest.approx(two.robust[1, 1].mean())


def test_expected_accuracy_by_hand():
    flags = np.array([[True, False], [True, True]])
    np.testing.assert_allclose(expected_accuracy(flags, np.array([0.25, 0.75])), [1.0, 0.75])


def test_checkpoints_keep_the_latest_and_the_best(tmp_path):
    import jax.numpy as jnp

    from rst_jax.state import TicketState

    def state(step, value):
        tree = {"a": jnp.full(3, value)}
        return TicketState(jnp.int32(step), tree, tree, {}, (tree, jnp.int32(step)))

    store = RunCheckpoints(tmp_path / "run")
    assert store.restore_latest(state(0, 0.0)) is None
    for step in (1, 2, 3):
        store.save_latest(state(step, float(step)), {"best_step": 2})
    store.save_best(state(2, 2.0))
    store.save_best(state(2, 2.5))  # the same step again, after a resume
    store.close()
    store = RunCheckpoints(tmp_path / "run")
    latest, kept = store.restore_latest(state(0, 0.0))
    assert (int(latest.step), kept) == (3, {"best_step": 2})
    np.testing.assert_array_equal(latest.opt_state[0]["a"], np.full(3, 3.0))
    np.testing.assert_array_equal(store.restore_best(state(0, 0.0), 2).params["a"], np.full(3, 2.5))
    store.close()
    for file in (tmp_path / "run" / "latest").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"latest.3: this checkpoint cannot be read"):
        RunCheckpoints(tmp_path / "run").restore_latest(state(0, 0.0))
