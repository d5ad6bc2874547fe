import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rst_jax import subnet

SHAPES = {"element": (3, 3, 2, 5), "row": (3, 1, 2, 5), "kernel": (1, 1, 2, 5), "filter": (1, 1, 1, 5)}


def numpy_mask(scores: np.ndarray, kept: int) -> np.ndarray:
    """The released code's rule, written apart: a stable ascending sort of |scores| in OIHW order, the last `kept`."""
    axes = (scores.ndim - 1, scores.ndim - 2, *range(scores.ndim - 2)) if scores.ndim > 1 else (0,)
    turned = np.abs(scores).transpose(axes)
    order = np.argsort(turned.reshape(-1), kind="stable")
    mask = np.zeros(turned.size, bool)
    mask[order[turned.size - kept :]] = True
    return mask.reshape(turned.shape).transpose(np.argsort(axes))


@pytest.mark.parametrize(
    ("scores", "kept", "mask"),
    [
        ([0.1, -0.5, 0.3, 0.2], 2, [0, 1, 1, 0]),
        ([1.0, 1.0, 1.0, 1.0], 2, [0, 0, 1, 1]),
        ([2.0, -1.0, 1.0, 1.0, 0.0], 3, [1, 0, 1, 1, 0]),
        ([2.0, -1.0, 1.0, 1.0, 0.0], 2, [1, 0, 0, 1, 0]),
        ([0.0, -0.0, 0.0], 1, [0, 0, 1]),
        ([3.0, 2.0], 2, [1, 1]),
        ([3.0, 2.0], 0, [0, 0]),
        ([1e-45, 0.0, 1e-40], 2, [1, 0, 1]),
        ([np.inf, 1.0, -np.inf], 1, [0, 0, 1]),
    ],
)
def test_literal_masks(scores, kept, mask):
    for f in (subnet.top_k_mask, jax.jit(subnet.top_k_mask)):
        np.testing.assert_array_equal(f(jnp.asarray(scores, jnp.float32), kept), np.asarray(mask, bool))


def test_ties_go_to_the_later_index_in_the_order_out_in_height_width():
    mask = np.asarray(subnet.top_k_mask(jnp.ones((2, 2, 3, 4)), 13))
    assert mask[..., 3].all()  # the last output channel: 12 weights
    assert mask.sum() == 13
    assert mask[1, 1, 2, 2]  # then the last weight of the channel before


@settings(deadline=None, max_examples=60)
@given(
    hnp.arrays(np.float32, st.sampled_from([(7,), (3, 4), (3, 3, 2, 3), (1, 1, 4, 5)]),
               elements=st.sampled_from([0.0, -0.5, 0.5, 0.25, -2.0, 1e-30])),
    st.data(),
)  # fmt: skip
def test_mask_is_the_stable_sorts(scores, data):
    kept = data.draw(st.integers(0, scores.size))
    mask = np.asarray(subnet.top_k_mask(jnp.asarray(scores), kept))
    assert mask.sum() == kept
    np.testing.assert_array_equal(mask, numpy_mask(scores, kept))


def test_mask_of_continuous_scores_in_float64():
    with jax.enable_x64(True):
        scores = np.random.default_rng(0).normal(size=(3, 3, 8, 16))
        np.testing.assert_array_equal(subnet.top_k_mask(jnp.asarray(scores), 100), numpy_mask(scores, 100))


@pytest.mark.parametrize(
    ("n", "ratio", "kept"),
    [(100, 0.1, 10), (77360, 0.1, 7736), (10, 0.05, 1), (3, 0.5, 2), (9, 1.0, 9), (1000, 0.9, 901)],
)
def test_kept_count(n, ratio, kept):
    assert subnet.kept_count(n, ratio) == n - int((1 - ratio) * n) == kept


def test_a_layer_that_keeps_nothing_is_named():
    with pytest.raises(ValueError, match=r"conv1.*keeps none of 4 scores"):
        subnet.kept_counts({"conv1": {"kernel": jnp.ones(4)}}, 1e-17)
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        subnet.kept_counts({}, 0.0)


@pytest.mark.parametrize("pattern", SHAPES)
def test_score_shapes(pattern):
    assert subnet.score_shape((3, 3, 2, 5), pattern) == SHAPES[pattern]
    assert subnet.score_shape((2, 5), pattern) == ((1, 5) if pattern == "filter" else (2, 5))


@pytest.mark.parametrize("pattern", SHAPES)
def test_straight_through_gradient_is_the_formula(pattern):
    rng = np.random.default_rng(1)
    weights, target = (rng.normal(size=(3, 3, 2, 5)).astype(np.float32) for _ in range(2))
    scores = rng.normal(size=SHAPES[pattern]).astype(np.float32)
    scores.flat[0] = 0.0
    kept = scores.size // 2

    def loss(w, s):
        tree = {"a": {"kernel": w}}, {"a": {"kernel": s}}, {"a": {"kernel": subnet.top_k_mask(s, kept)}}
        return jnp.sum(jnp.sin(subnet.materialise(*tree)["a"]["kernel"]) * target)

    g_weights, g_scores = jax.jit(jax.grad(loss, (0, 1)))(weights, scores)
    mask = numpy_mask(scores, kept)
    g = np.cos(weights * mask) * target  # d loss / d masked weight
    shared = tuple(i for i in range(4) if scores.shape[i] == 1 and weights.shape[i] > 1)
    np.testing.assert_allclose(
        g_scores, np.sign(scores) * (g * weights).sum(shared, keepdims=True), rtol=2e-5, atol=1e-6
    )
    np.testing.assert_allclose(g_weights, g * mask, rtol=2e-5, atol=1e-6)
    assert np.asarray(g_scores).flat[0] == 0


def test_parameters_without_scores_pass_through():
    params = {"conv": {"kernel": jnp.ones((1, 1, 2, 2)), "bias": jnp.ones(2)}, "bn": {"scale": jnp.ones(2)}}
    structs = subnet.score_structs(params, "element")
    assert jax.tree.structure(structs) == jax.tree.structure({"conv": {"kernel": 0}})
    masks = {"conv": {"kernel": jnp.zeros((1, 1, 2, 2), bool)}}
    out = subnet.apply_masks(params, masks)
    assert float(out["conv"]["kernel"].sum()) == 0
    assert out["conv"]["bias"] is params["conv"]["bias"]
    assert out["bn"]["scale"] is params["bn"]["scale"]
    assert subnet.apply_masks(params, {}) == params


def test_a_model_without_kernels_is_refused():
    with pytest.raises(ValueError, match="no kernel"):
        subnet.kernels({"bn": {"scale": jnp.ones(2)}})


@settings(deadline=None)
@given(hnp.arrays(bool, hnp.array_shapes(min_dims=1, max_dims=4)))
def test_packing_round_trips(mask):
    packed = subnet.pack({"a": mask})
    assert packed["a"].dtype == np.uint8
    assert packed["a"].size == -(-mask.size // 8)
    np.testing.assert_array_equal(subnet.unpack(packed, {"a": mask})["a"], mask)
