import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rst_jax.attacks import pgd
from rst_jax.config import PGDSettings
from rst_jax.losses import cross_entropy
from rst_jax.threat import ThreatModel

RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.uniform(0.3, 0.7, (6, 4)), jnp.float32)
WEIGHTS = jnp.asarray(RNG.normal(size=(4, 2)), jnp.float32)
LABELS = jnp.asarray([0, 1, 0, 1, 1, 0], jnp.int32)


def linear(x):
    return jnp.matmul(x, WEIGHTS, precision="highest")


def margin(x):
    z = linear(x)
    return z[jnp.arange(6), LABELS] - z[jnp.arange(6), 1 - LABELS]


def direction():
    return (WEIGHTS[:, LABELS] - WEIGHTS[:, 1 - LABELS]).T


@pytest.mark.parametrize("unroll", [False, True])
def test_fgsm_on_a_linear_model_is_the_closed_form(unroll):
    adversarial = pgd(linear, IMAGES, LABELS, ThreatModel(0.1), settings=PGDSettings(1, 0.1), unroll=unroll)
    np.testing.assert_allclose(adversarial, IMAGES - 0.1 * jnp.sign(direction()), atol=1e-6)
    fall = margin(IMAGES) - margin(adversarial)
    np.testing.assert_allclose(fall, 0.1 * np.abs(direction()).sum(1), rtol=1e-4)


def test_l2_pgd_on_a_linear_model_reaches_the_closed_form():
    adversarial = pgd(linear, IMAGES, LABELS, ThreatModel(0.2, "l2"), settings=PGDSettings(10, 0.05))
    fall = margin(IMAGES) - margin(adversarial)
    np.testing.assert_allclose(fall, 0.2 * np.linalg.norm(direction(), axis=1), rtol=1e-4)


def test_fgsm_rs_stays_in_the_ball_and_uses_its_start():
    threat = ThreatModel(0.1)
    start = threat.noise(jax.random.split(jax.random.key(0), 6), IMAGES)
    adversarial = pgd(linear, IMAGES, LABELS, threat, settings=PGDSettings(1, 0.125), start=start)
    expected = jnp.clip(start - 0.125 * jnp.sign(direction()), -0.1, 0.1)
    np.testing.assert_allclose(adversarial - IMAGES, expected, atol=1e-6)


def test_one_step_is_numpys():
    """One projected step on a two-layer network, written apart with an analytic gradient."""
    hidden = RNG.normal(size=(4, 5)).astype(np.float32)
    head = RNG.normal(size=(5, 3)).astype(np.float32)
    labels = np.array([0, 1, 2, 0, 1, 2], np.int32)
    x = np.asarray(IMAGES)
    pre = x @ hidden
    z = np.maximum(pre, 0) @ head
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    gradient = (((p - np.eye(3)[labels]) @ head.T) * (pre > 0)) @ hidden.T
    expected = np.clip(np.clip(x + 0.3 * np.sign(gradient), x - 0.2, x + 0.2), 0, 1)

    def net(x):
        return jax.nn.relu(x @ hidden) @ head

    got = pgd(net, IMAGES, jnp.asarray(labels), ThreatModel(0.2), settings=PGDSettings(1, 0.3))
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_scan_and_unrolled_agree():
    kw = dict(settings=PGDSettings(5, 0.03), rest_when_broken=True)
    a, b = (pgd(linear, IMAGES, LABELS, ThreatModel(0.1), unroll=u, **kw) for u in (False, True))
    np.testing.assert_array_equal(a, b)


def test_no_steps_or_no_radius_change_nothing():
    np.testing.assert_array_equal(pgd(linear, IMAGES, LABELS, ThreatModel(0.1), settings=PGDSettings(0, 0.1)), IMAGES)
    np.testing.assert_array_equal(pgd(linear, IMAGES, LABELS, ThreatModel(0.0), settings=PGDSettings(3, 0.1)), IMAGES)


def test_an_example_rests_once_it_is_broken():
    wrong = jnp.argmax(linear(IMAGES), -1).astype(jnp.int32) != LABELS
    resting = pgd(linear, IMAGES, LABELS, ThreatModel(0.1), settings=PGDSettings(3, 0.05), rest_when_broken=True)
    moving = pgd(linear, IMAGES, LABELS, ThreatModel(0.1), settings=PGDSettings(3, 0.05))
    moved = np.asarray(jnp.any(resting != IMAGES, 1))
    np.testing.assert_array_equal(moved, ~np.asarray(wrong))
    assert np.asarray(jnp.any(moving != IMAGES, 1)).all()
    assert wrong.any()


def test_memory_is_carried_through_every_forward():
    def counting(x, seen):
        return linear(x), seen + 1

    for unroll in (False, True):
        adversarial, seen = pgd(
            counting,
            IMAGES,
            LABELS,
            ThreatModel(0.1),
            settings=PGDSettings(7, 0.02),
            memory=jnp.int32(0),
            unroll=unroll,
        )
        assert int(seen) == 7
        np.testing.assert_array_equal(
            adversarial, pgd(linear, IMAGES, LABELS, ThreatModel(0.1), settings=PGDSettings(7, 0.02), unroll=unroll)
        )


def test_padding_that_is_not_a_number_stays_in_its_rows():
    poisoned = jnp.concatenate([IMAGES, jnp.full((2, 4), jnp.nan)])
    labels = jnp.concatenate([LABELS, jnp.zeros(2, jnp.int32)])
    kw = dict(threat=ThreatModel(0.1), settings=PGDSettings(4, 0.03), rest_when_broken=True)
    np.testing.assert_array_equal(pgd(linear, poisoned, labels, **kw)[:6], pgd(linear, IMAGES, LABELS, **kw))


def test_the_loss_rises_at_least_to_its_value_at_the_start():
    before = cross_entropy(linear(IMAGES), LABELS)
    after = cross_entropy(linear(pgd(linear, IMAGES, LABELS, ThreatModel(0.1), settings=PGDSettings(8, 0.03))), LABELS)
    assert (after > before).all()
