import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from rst_jax import config as config_lib
from rst_jax.data import Split, load_dataset
from rst_jax.evaluation.accuracy import Evaluator
from rst_jax.evaluation.evidence import correct
from rst_jax.initializers import init_variables
from rst_jax.models.resnet import ResNet
from rst_jax.runtime.mesh import make_mesh
from rst_jax.threat import ThreatModel

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
    # The labels are what the network says, so that there is something to break.
    logits = Evaluator(MODEL, settings(), make_mesh(), KEY).logits(variables, data.test.scaled())
    labels = np.argmax(logits, -1).astype(data.test.labels.dtype)
    return variables, dataclasses.replace(data.test, labels=labels)


def judged(evaluator, attacked, judges, split):
    """All batches of a split as one: natural [N], robust [K, N], violations, adversarial images [N, H, W, C]."""
    batches = list(evaluator.judged(attacked, judges, split))
    return (
        np.concatenate([batch.natural for batch in batches]),
        np.concatenate([batch.robust for batch in batches], axis=-1),
        sum(batch.violations for batch in batches),
        np.concatenate([batch.adversarial for batch in batches]),
    )


def test_results_do_not_hang_on_batch_size_order_padding_or_devices(some):
    variables, split = some
    order = np.random.default_rng(0).permutation(len(split))
    found = []
    for devices, size in ((1, 53), (1, 8), (4, 20)):
        evaluator = Evaluator(MODEL, settings(batch_size=size), make_mesh(jax.devices()[:devices]), KEY)
        for place in (np.arange(len(split)), order):
            natural, robust, outside, adversarial = judged(evaluator, variables, [variables], split.take(place))
            back = np.argsort(place)
            found.append((adversarial[back], robust[0, back]))
            assert natural.all()
            assert outside == 0
    for adversarial, right in found[1:]:
        np.testing.assert_allclose(adversarial, found[0][0], atol=1e-6)
        np.testing.assert_array_equal(right, found[0][1])
    assert 0 < found[0][1].mean() < 1


def test_no_radius_is_clean_accuracy_and_a_large_one_breaks_everything(some):
    variables, split = some
    for eps, step, accuracy in ((0.0, 0.1, 1.0), (1.0, 0.25, 0.0)):
        config = dataclasses.replace(settings(step_size=step), threat=ThreatModel(eps))
        evaluator = Evaluator(MODEL, config, make_mesh(), KEY)
        assert evaluator.accuracies(variables, split) == (1.0, accuracy)


def test_every_network_judges_for_itself(some):
    """Against the two compiled programs called by hand."""
    variables, split = some
    v = init_variables(MODEL, (8, 8, 1), jax.random.key(2))
    other = {name: v[name] for name in variables}
    evaluator = Evaluator(MODEL, settings(batch_size=20), make_mesh(), KEY)
    natural, robust, _, adversarial = judged(evaluator, other, [variables, other], split)
    images = split.scaled()
    by_hand = [
        np.argmax(evaluator.logits(w, x), -1) == split.labels for w, x in ((other, images), (variables, adversarial))
    ]
    np.testing.assert_array_equal(natural, by_hand[0])
    np.testing.assert_array_equal(robust[0], by_hand[1])
    assert (robust[0] != robust[1]).any()
    assert 0 < np.abs(adversarial - images).max() <= settings().threat.eps + 1e-6


def test_an_attack_that_leaves_the_ball_is_not_counted(some):
    variables, split = some
    evaluator = Evaluator(MODEL, settings(batch_size=20), make_mesh(), KEY)
    evaluator._attack = lambda v, x, y, i, k: jnp.where((i % 2 == 1).reshape(-1, 1, 1, 1), x + 0.5, x)  # it cheats
    _, robust, outside, adversarial = judged(evaluator, variables, [variables], split)
    assert outside == (split.ids % 2 == 1).sum() > 0
    np.testing.assert_array_equal(adversarial, split.scaled())
    np.testing.assert_array_equal(robust[0], split.ids % 2 == 0)  # an attack that failed to run, not a robust example


def test_violations_of_padding_are_not_counted(some):
    variables, split = some
    evaluator = Evaluator(MODEL, settings(batch_size=20), make_mesh(), KEY)
    evaluator._attack = lambda v, x, y, i, k: jnp.full_like(x, jnp.nan)
    assert judged(evaluator, variables, [variables], split)[2] == len(split) == 53


def test_logits_that_are_not_finite_are_wrong(some):
    variables, split = some
    broken = jax.tree.map(lambda x: np.full_like(x, np.nan), variables)
    evaluator = Evaluator(MODEL, settings(), make_mesh(), KEY)
    zeros = dataclasses.replace(split, labels=np.zeros_like(split.labels))
    assert evaluator.accuracies(broken, zeros) == (0.0, 0.0)
    logits = np.asarray([[2.0, 1.0], [2.0, np.nan], [np.inf, 0.0], [0.0, 1.0]])
    np.testing.assert_array_equal(correct(logits, np.asarray([0, 0, 0, 0])), [True, False, False, False])


def test_no_more_than_a_few_batches_are_scaled_ahead(some, monkeypatch):
    variables, split = some
    evaluator = Evaluator(MODEL, settings(batch_size=8), make_mesh(), KEY)
    scaled, batch = [], Split.batch
    monkeypatch.setattr(Split, "batch", lambda self, index: scaled.append(len(self.ids[index])) or batch(self, index))
    with contextlib.closing(evaluator.judged(variables, [variables], split)) as batches:
        next(batches)
    assert len(scaled) <= 4
    assert max(scaled) == 8  # two a device
