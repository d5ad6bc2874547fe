import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rst_jax import initializers

SHAPE = (3, 3, 64, 128)
FAN_IN, FAN_OUT = 9 * 64, 9 * 128
STD = {
    "signed_kaiming_constant": (2 / FAN_IN) ** 0.5,
    "unsigned_constant": (2 / FAN_IN) ** 0.5,
    "kaiming_normal": (2 / FAN_IN) ** 0.5,
    "kaiming_uniform": (2 / FAN_IN) ** 0.5,
    "xavier_normal": (2 / (FAN_IN + FAN_OUT)) ** 0.5,
    "xavier_constant": (2 / (FAN_IN + FAN_OUT)) ** 0.5,
    "torch_default": (1 / (3 * FAN_IN)) ** 0.5,
}
PARAMS = {"conv": {"kernel": jnp.zeros(SHAPE), "bias": jnp.full(128, 7.0)}}


@pytest.mark.parametrize("name", initializers.WEIGHTS)
def test_second_moment_of_the_weights(name):
    drawn = initializers.sample_weights(jax.random.key(0), PARAMS, name)
    w = np.asarray(drawn["conv"]["kernel"])
    assert np.sqrt(np.mean(w**2)) == pytest.approx(STD[name], rel=0.02)
    assert drawn["conv"]["bias"] is PARAMS["conv"]["bias"]
    if "constant" in name:
        np.testing.assert_allclose(np.abs(w), STD[name], rtol=1e-6)
    assert (abs(w.mean()) < 0.02 * STD[name]) == (name != "unsigned_constant")
    scaled = initializers.sample_weights(jax.random.key(0), PARAMS, name, fan_scale=0.25)
    np.testing.assert_allclose(scaled["conv"]["kernel"], 2 * w, rtol=1e-5)


def test_bounds_of_the_uniform_ones():
    for name, bound in (("kaiming_uniform", (6 / FAN_IN) ** 0.5), ("torch_default", FAN_IN**-0.5)):
        w = np.abs(initializers.sample_weights(jax.random.key(1), PARAMS, name)["conv"]["kernel"])
        assert 0.999 * bound < w.max() <= bound


@pytest.mark.parametrize(("pattern", "fan"), [("element", 9 * 64), ("row", 3 * 64), ("kernel", 64)])
def test_scores_are_uniform_within_their_own_fan(pattern, fan):
    s = np.asarray(initializers.sample_scores(jax.random.key(0), PARAMS, pattern)["conv"]["kernel"])
    assert 0.99 * fan**-0.5 < np.abs(s).max() <= fan**-0.5
    assert abs(s.mean()) < 0.03 * fan**-0.5


def test_filter_scores_are_normal():
    params = {"conv": {"kernel": jnp.zeros((1, 1, 2, 20000))}}
    s = np.asarray(initializers.sample_scores(jax.random.key(0), params, "filter")["conv"]["kernel"])
    assert s.shape == (1, 1, 1, 20000)
    assert abs(s.mean()) < 0.03
    assert s.std() == pytest.approx(1, rel=0.03)


def test_a_layer_does_not_depend_on_its_neighbours():
    more = {**PARAMS, "a_new_layer": {"kernel": jnp.zeros((2, 2))}}
    for draw in (
        lambda p: initializers.sample_weights(jax.random.key(3), p, "kaiming_normal"),
        lambda p: initializers.sample_scores(jax.random.key(3), p, "element"),
    ):
        np.testing.assert_array_equal(draw(PARAMS)["conv"]["kernel"], draw(more)["conv"]["kernel"])


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="signed_kaiming_constant"):
        initializers.sample_weights(jax.random.key(0), PARAMS, "ones")
