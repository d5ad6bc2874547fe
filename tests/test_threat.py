import itertools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rst_jax.threat import ThreatModel

NORMS = ("linf", "l2")


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(NORMS), st.floats(0, 1), st.integers(0, 2**31), st.integers(1, 8))
def test_projection_lands_in_ball_and_box_and_keeps_what_is_inside(norm, eps, seed, size):
    rng = np.random.default_rng(seed)
    images = jnp.asarray(rng.uniform(size=(3, size)), jnp.float32)
    far = images + jnp.asarray(rng.normal(size=(3, size)), jnp.float32)
    threat = ThreatModel(eps, norm)
    once = threat.project(far, images)
    assert not np.any(threat.violations(once, images))
    np.testing.assert_allclose(threat.project(once, images), once, atol=2e-7)
    np.testing.assert_array_equal(threat.project(images, images), images)


def test_linf_projection_is_the_nearest_point_by_brute_force():
    grid = np.array(list(itertools.product(np.linspace(0, 1, 41), repeat=2)))
    image, far = np.array([0.1, 0.5]), np.array([-0.3, 0.9])
    inside = grid[np.abs(grid - image).max(1) <= 0.2 + 1e-9]
    nearest = inside[np.square(inside - far).sum(1).argmin()]
    got = ThreatModel(0.2).project(jnp.asarray(far[None], jnp.float32), jnp.asarray(image[None], jnp.float32))
    np.testing.assert_allclose(got[0], nearest, atol=1e-6)


def test_l2_projection_scales_radially():
    image = jnp.full((1, 2), 0.5)
    got = ThreatModel(0.5, "l2").project(image + jnp.asarray([[3.0, 4.0]]) / 10 * 1.0 + 0, image)
    np.testing.assert_allclose(got, [[0.8, 0.9]], atol=1e-6)
    got = ThreatModel(0.25, "l2").project(image + jnp.asarray([[0.3, 0.4]]), image)
    np.testing.assert_allclose(got, [[0.65, 0.7]], atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_noise_is_uniform_in_the_ball_and_hangs_on_the_key_alone(norm):
    threat, images = ThreatModel(0.3, norm), jnp.full((2000, 3), 0.5)
    keys = jax.random.split(jax.random.key(0), 2000)
    noise = np.asarray(threat.noise(keys, images))
    size = np.abs(noise).max(1) if norm == "linf" else np.linalg.norm(noise, axis=1)
    assert size.max() <= 0.3 + 1e-6
    # P(size <= r) = (r / eps)^3 for a uniform draw from a three-dimensional ball of either norm
    assert np.mean(size <= 0.3 * 0.5 ** (1 / 3)) == pytest.approx(0.5, abs=0.04)
    assert np.abs(noise.mean(0)).max() < 0.02
    np.testing.assert_allclose(threat.noise(keys[5:9], images[:4]), noise[5:9], rtol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_on_the_host_it_is_numpys_and_the_same(norm):
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(8, 5, 4, 3)).astype(np.float32)
    other = (images + rng.normal(scale=0.1, size=images.shape)).astype(np.float32)
    other[0, 0, 0, 0] = np.nan
    threat = ThreatModel(0.2 if norm == "linf" else 0.7, norm)
    for call in (
        lambda x, y: threat.ascend(x, y - x, 0.1, x),
        lambda x, y: threat.project(y, x),
        lambda x, y: threat.unit(y - x),
        lambda x, y: threat.distance(y, x),
        lambda x, y: threat.violations(y, x),
        lambda x, y: threat.violations(threat.project(y, x), x),
    ):
        here = call(images, other)
        assert isinstance(here, np.ndarray)
        assert here.dtype in (np.float32, bool)
        np.testing.assert_allclose(here, call(jnp.asarray(images), jnp.asarray(other)), rtol=2e-6, atol=1e-7)
    assert threat.violations(other, images).any()
    assert not threat.violations(threat.project(other, images), images)[1:].any()


def test_steepest_and_distance():
    g = jnp.asarray([[3.0, -4.0], [0.0, 0.0]])
    np.testing.assert_array_equal(ThreatModel(1.0).steepest(g), [[1, -1], [0, 0]])
    np.testing.assert_allclose(ThreatModel(1.0, "l2").steepest(g), [[0.6, -0.8], [0, 0]], rtol=1e-6)
    np.testing.assert_allclose(ThreatModel(1.0).distance(g, 0 * g), [4, 0])
    np.testing.assert_allclose(ThreatModel(1.0, "l2").distance(g, 0 * g), [5, 0])


def test_violations_are_seen():
    images = jnp.full((5, 2), 0.5)
    moved = images + jnp.asarray([[0.0, 0.1], [0.0, 0.11], [0.6, 0.0], [jnp.nan, 0.0], [0.0, 0.0]])
    np.testing.assert_array_equal(ThreatModel(0.1).violations(moved, images), [False, True, True, True, False])


def test_refusals(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as where annotations are not checked
    with pytest.raises(ValueError, match="norm must be"):
        ThreatModel(0.1, "l1")
    with pytest.raises(ValueError, match="at least 0"):
        ThreatModel(-0.1)
