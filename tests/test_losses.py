import jax.numpy as jnp
import numpy as np

from rst_jax.losses import correct, cross_entropy

LOGITS = jnp.log(jnp.asarray([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
LABELS = jnp.asarray([0, 1], jnp.int32)


def test_cross_entropy_by_hand():
    np.testing.assert_allclose(cross_entropy(LOGITS, LABELS), [np.log(2), np.log(10)], rtol=1e-6)
    np.testing.assert_allclose(cross_entropy(LOGITS + 100.0, LABELS), [np.log(2), np.log(10)], rtol=1e-5)


def test_label_smoothing_spreads_over_all_classes():
    uniform = [-(np.log(0.5) + 2 * np.log(0.25)) / 3, -(2 * np.log(0.1) + np.log(0.8)) / 3]
    expected = 0.9 * np.array([np.log(2), np.log(10)]) + 0.1 * np.array(uniform)
    np.testing.assert_allclose(cross_entropy(LOGITS, LABELS, 0.1), expected, rtol=1e-6)


def test_correct_takes_the_first_of_equal_logits():
    logits = jnp.asarray([[1.0, 1.0], [1.0, 1.0], [0.0, 2.0]])
    np.testing.assert_array_equal(correct(logits, jnp.asarray([0, 1, 1], jnp.int32)), [True, False, True])
