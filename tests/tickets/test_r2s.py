import jax
import numpy as np
import pytest

from rst_jax.experiments.switching import r2s_record
from rst_jax.experiments.transfer import Crossed
from rst_jax.models import ModelSpec
from rst_jax.tickets.r2s import R2S, expected_accuracy, load_r2s
from rst_jax.tickets.store import save_tickets
from rst_jax.tickets.ticket import Ticket
from tests.drawing import IMAGES, SPEC, draw


@pytest.fixture(scope="module")
def drawn():
    return [draw(r)[0] for r in (0.1, 0.3)]


def test_r2s_gives_every_image_the_logits_of_the_ticket_drawn_for_it(drawn):
    defence = R2S(drawn)
    images = np.repeat(IMAGES, 8, axis=0)
    logits = np.stack([t(images) for t in drawn])
    draws = np.asarray(defence.pick(jax.random.key(3), 40))
    np.testing.assert_array_equal(defence(images, jax.random.key(3)), logits[draws, np.arange(40)])
    assert set(draws) == {0, 1}
    assert (np.asarray(defence.pick(jax.random.key(4), 40)) != draws).any()
    jitted = jax.jit(lambda x, k: defence(x, k))
    np.testing.assert_allclose(jitted(images, jax.random.key(3)), logits[draws, np.arange(40)], rtol=1e-5, atol=1e-6)
    for key in (5, 6):  # a key closed over at the first trace would freeze the draw
        expected = logits[np.asarray(defence.pick(jax.random.key(key), 40)), np.arange(40)]
        np.testing.assert_allclose(jitted(images, jax.random.key(key)), expected, rtol=1e-5, atol=1e-6)


def test_r2s_draws_by_its_probabilities(drawn):
    draws = np.asarray(R2S(drawn, [0.8, 0.2]).pick(jax.random.key(0), 4000))
    assert np.mean(draws == 0) == pytest.approx(0.8, abs=0.03)
    assert not np.asarray(R2S(drawn, [1.0, 0.0]).pick(jax.random.key(0), 100)).any()


def test_r2s_refuses_what_cannot_be_switched(drawn):
    with pytest.raises(ValueError, match="at least one"):
        R2S([])
    with pytest.raises(ValueError, match="sum to 1"):
        R2S(drawn, [0.5, 0.6])
    with pytest.raises(ValueError, match="2 numbers"):
        R2S(drawn, [1.0])
    nan, inf = float("nan"), float("inf")
    wrong = (
        [nan, 1.0],
        [nan, nan],
        [inf, 0.0],
        [inf, -inf],
        [-0.5, 1.5],
        [1, 1],
        [0, 0],
        [],
        1.0,
        ["a", "b"],
        [None, 1],
    )
    for probabilities in (*wrong, [[0.5], [0.5]], [[1.0], [0.5, 0.5]], np.eye(2), [1j, 1]):
        with pytest.raises(ValueError, match="probabilities must be 2 numbers of at least 0 that sum to 1; got"):
            R2S(drawn, probabilities)
    other = Ticket(
        ModelSpec(SPEC.name, 10, (0.5,), SPEC.std), (8, 8, 1), 0.1, drawn[0].weights, {}, drawn[0].batch_stats
    )
    with pytest.raises(ValueError, match="one network"):
        R2S([drawn[0], other])


def test_r2s_from_the_checkpoint_is_the_tickets(tmp_path, drawn):
    _, v = draw()
    save_tickets(tmp_path / "tickets", v["params"], drawn)
    save_tickets(tmp_path / "tickets", v["params"], drawn[::-1])  # written anew
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
    return Crossed(rng.random((k, n)) < 0.9, rng.random((k, k, n)) < 0.6, [0] * k, [], [])


def test_r2s_is_exact_by_enumeration(drawn):
    flags = crossed(2, 50)
    p = np.array([0.3, 0.7])
    record = r2s_record(flags, drawn, p, None)
    by_hand = sum(p[s] * p[k] * flags.robust[s, k].mean() for s in (0, 1) for k in (0, 1))
    assert record.transfer_only == pytest.approx(by_hand)
    assert record.natural == pytest.approx(0.3 * flags.natural[0].mean() + 0.7 * flags.natural[1].mean())
    worst = np.mean([min(sum(p[k] * flags.robust[s, k, n] for k in (0, 1)) for s in (0, 1)) for n in range(50)])
    assert record.worst_of_pool == pytest.approx(worst)
    breakable = np.max([p[k] * ~flags.robust[k, k] for k in (0, 1)], axis=0)
    assert record.worst_of_pool <= np.mean(1 - breakable) + 1e-12


def test_copies_of_one_ticket_and_certain_draws_are_that_ticket(drawn):
    one = crossed(1, 80)
    copies = Crossed(np.repeat(one.natural, 3, 0), np.broadcast_to(one.robust, (3, 3, 80)), [0] * 3, [], [])
    record = r2s_record(copies, [drawn[0]] * 3, np.full(3, 1 / 3), None)
    single = one.robust[0, 0].mean()
    for value in (record.transfer_only, record.worst_of_pool, record.best_single):
        assert value == pytest.approx(single)
    two = crossed(2, 80)
    sure = r2s_record(two, drawn, np.array([0.0, 1.0]), None)
    assert sure.natural == pytest.approx(two.natural[1].mean())
    assert sure.transfer_only == pytest.approx(two.robust[1, 1].mean())


def test_expected_accuracy_by_hand():
    flags = np.array([[True, False], [True, True]])
    np.testing.assert_allclose(expected_accuracy(flags, np.array([0.25, 0.75])), [1.0, 0.75])
