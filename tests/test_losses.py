import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rst_jax.losses import at, correct, cross_entropy, margin, targeted_dlr, weighed

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


AWKWARD = np.asarray(
    [
        [1, 1, 0, 2],
        [0, 0, 0, 0],
        [3, -np.inf, 2, 3],
        [np.inf, np.inf, 0, 1],
        [np.nan, 1, 2, 3],
        [np.inf, 0, 0, 0],
        [5, 4, 4, 4],
    ],
    np.float32,
)


def test_on_the_host_they_are_numpys_and_the_same():
    for label in range(4):
        labels = np.full(len(AWKWARD), label, np.int32)
        for function in (at, margin, correct):
            here, there = function(AWKWARD, labels), function(jnp.asarray(AWKWARD), jnp.asarray(labels))
            assert isinstance(here, np.ndarray)
            np.testing.assert_array_equal(here, there)


def test_ratios_count_equal_logits_as_a_sort_does():
    rng = np.random.default_rng(0)
    logits = rng.integers(-2, 3, (200, 7)).astype(np.float32)
    logits = logits[np.sort(logits)[:, -1] > np.sort(logits)[:, -3]]
    z, labels = -np.sort(-logits), np.zeros(len(logits), np.int32)
    assert len(logits) > 50
    assert (z[:, 1:3] == z[:, 2:4]).any()
    np.testing.assert_allclose(weighed(jnp.asarray(logits), (1, 0, -1)), z[:, 0] - z[:, 2], rtol=1e-6)
    expected = (logits[:, 3] - logits[:, 0]) / (z[:, 0] - (z[:, 2] + z[:, 3]) / 2)
    np.testing.assert_allclose(targeted_dlr(jnp.asarray(logits), labels, labels + 3), expected, rtol=1e-6)


def test_ratios_of_many_classes_take_little_memory():
    like, labels = jax.ShapeDtypeStruct((64, 1000), jnp.float32), np.zeros(64, np.int32)
    compiled = jax.jit(jax.grad(lambda z: jnp.sum(targeted_dlr(z, labels, labels + 1)))).lower(like).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 40 * like.size * 4


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_margins_keep_the_dtype(dtype):
    logits, labels = np.asarray([[1, 2, 0], [3, 1, 0]], dtype), np.zeros(2, np.int32)
    for there in (logits, jnp.asarray(logits)):
        assert margin(there, labels).dtype == dtype
        np.testing.assert_array_equal(margin(there, labels), [-1, 2])
