import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from rst_jax import config as config_lib
from rst_jax.data import load_dataset
from rst_jax.evaluate import Evaluator, ticket_record
from rst_jax.mesh import make_mesh
from rst_jax.models.resnet import ResNet
from rst_jax.state import init_variables
from rst_jax.transfer import cross
from tests.drawing import draw

CONFIG = config_lib.from_dict(digits.get_config())
MODEL = ResNet(num_classes=10, mean=(0.3,), std=(0.4,), blocks=(1,), widths=(8,), stem_stride=2)
KEY = np.asarray(jax.random.key_data(jax.random.key(7)))


def settings(**changes):
    return dataclasses.replace(CONFIG, evaluate=dataclasses.replace(CONFIG.evaluate, steps=4, **changes))


@pytest.fixture(scope="module")
def some():
    data = load_dataset(dataclasses.replace(CONFIG, evaluate=dataclasses.replace(CONFIG.evaluate, examples=53)))
    v = init_variables(MODEL, (8, 8, 1), jax.random.key(1))
    variables = {name: v[name] for name in ("params", "batch_stats")}
    images, labels = data.scaled(data.test), data.test.labels
    # The labels are what the network says, so that there is something to break.
    logits = Evaluator(MODEL, settings(), make_mesh(), KEY).logits(variables, images)
    return variables, images, np.argmax(logits, -1).astype(labels.dtype), data.test.ids


def test_results_do_not_hang_on_batch_size_order_padding_or_devices(some):
    variables, images, labels, ids = some
    order = np.random.default_rng(0).permutation(len(labels))
    found = []
    for devices, size in ((1, 53), (1, 8), (4, 20)):
        evaluator = Evaluator(MODEL, settings(batch_size=size), make_mesh(jax.devices()[:devices]), KEY)
        for place in (np.arange(len(labels)), order):
            adversarial, outside = evaluator.attack(variables, images[place], labels[place], ids[place])
            back = np.argsort(place)
            found.append((adversarial[back], evaluator.correct(variables, adversarial, labels[place])[back]))
            assert outside == 0
    for adversarial, right in found[1:]:
        np.testing.assert_allclose(adversarial, found[0][0], atol=1e-6)
        np.testing.assert_array_equal(right, found[0][1])
    assert 0 < found[0][1].mean() < 1


def test_no_radius_is_clean_accuracy_and_a_large_one_breaks_everything(some):
    variables, images, labels, ids = some
    for eps, step, accuracy in ((0.0, 0.1, 1.0), (1.0, 0.25, 0.0)):
        config = dataclasses.replace(settings(step_size=step), threat=config_lib.Threat("linf", eps))
        evaluator = Evaluator(MODEL, config, make_mesh(), KEY)
        adversarial, _ = evaluator.attack(variables, images, labels, ids)
        assert evaluator.correct(variables, adversarial, labels).mean() == accuracy


def test_an_attack_that_leaves_the_ball_is_not_counted(some):
    variables, images, labels, ids = some
    evaluator = Evaluator(MODEL, settings(), make_mesh(), KEY)
    evaluator._attack = lambda v, x, y, i, k: jnp.where(
        (i % 2 == 1).reshape(-1, 1, 1, 1), x + 0.5, x
    )  # a planted cheat
    adversarial, outside = evaluator.attack(variables, images, labels, ids)
    assert outside == (ids % 2 == 1).sum() > 0
    np.testing.assert_array_equal(adversarial, images)


def test_logits_that_are_not_finite_are_wrong(some):
    variables, images, labels, _ = some
    broken = jax.tree.map(lambda x: np.full_like(x, np.nan), variables)
    evaluator = Evaluator(MODEL, settings(), make_mesh(), KEY)
    assert not evaluator.correct(broken, images, np.zeros_like(labels)).any()


@pytest.mark.slow
def test_crossing_keeps_what_is_done_and_knows_its_own(tmp_path, monkeypatch):
    data = load_dataset(dataclasses.replace(CONFIG, evaluate=dataclasses.replace(CONFIG.evaluate, examples=30)))
    tickets = [draw(r)[0] for r in (0.2, 0.5)]
    evaluator = Evaluator(tickets[0].module, settings(), make_mesh(), KEY)
    first = cross(evaluator, tickets, data, tmp_path)
    assert first.robust.shape == (2, 2, 30)
    assert first.natural.shape == (2, 30)
    for i, ticket in enumerate(tickets):
        images = data.scaled(data.test)
        adversarial, _ = evaluator.attack(ticket.variables, images, data.test.labels, data.test.ids)
        for j, judge in enumerate(tickets):
            right = evaluator.correct(judge.variables, adversarial, data.test.labels)
            np.testing.assert_array_equal(first.robust[i, j], right)
        np.testing.assert_array_equal(first.shown[i], adversarial[first.shown_index[i]])
        assert len(set(first.shown_index[i])) == 10
    calls = []
    attack = evaluator.attack
    monkeypatch.setattr(evaluator, "attack", lambda *args: calls.append(1) or attack(*args))
    again = cross(evaluator, tickets, data, tmp_path)
    np.testing.assert_array_equal(again.robust, first.robust)
    assert not calls
    (tmp_path / "ratio-0.2.npz").write_bytes(b"cut off")
    cross(evaluator, tickets, data, tmp_path)
    assert len(calls) == 1
    cross(evaluator, tickets[::-1], data, tmp_path)  # other judges: nothing is reused
    assert len(calls) == 3

    meta = {"dataset": "digits", "selected_on": "holdout", "epoch": 3, "seed": 0}
    tickets[0].meta.update(meta)
    record = ticket_record(tickets[0], evaluator.attack_record, first.natural[0], first.robust[0, 0], 0)
    assert (record.weights_kept, record.weights_total) == tickets[0].weight_counts
    assert record.natural.value == first.natural[0].mean()
