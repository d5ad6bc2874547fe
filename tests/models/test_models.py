import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from rst_jax.initializers import init_variables
from rst_jax.models import MODELS, ModelSpec, layers
from rst_jax.models.layers import BatchNorm


def shapes(model, image_shape=(32, 32, 3)):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, *image_shape)), train=False))


def make(name, classes=10):
    return ModelSpec(name, classes, (0.5,), (0.25,)).make()


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("resnet18", 11_164_352),
        ("wrn34_10", 46_138_032),
        ("wrn10_1", 77_360),
        ("conv4", 2_425_024),
        ("imagenet_resnet18", 11_678_912),
        ("imagenet_resnet50", 25_502_912),
        ("imagenet_wide_resnet50_2", 68_814_016),
    ],
)
def test_weight_counts(name, weights):
    """Those of the paper's networks; for ImageNet torchvision's less batch norm's and the head's biases."""
    classes = 1000 if name.startswith("imagenet") else 10
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes(make(name, classes))["params"])) == weights


@pytest.mark.parametrize("name", MODELS)
def test_every_network_gives_logits_and_has_kernels_alone(name):
    model = make(name, 7)
    variables = shapes(model)
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(variables["params"])]
    assert all(p.endswith("['kernel']") for p in paths)
    for train in (False, True):
        out = jax.eval_shape(
            lambda v, t=train: model.apply(v, jnp.zeros((2, 32, 32, 3)), train=t, mutable=["batch_stats"]), variables
        )[0]
        assert out.shape == (2, 7)
        assert out.dtype == jnp.float32


def test_logits_are_float32_when_computed_in_bfloat16():
    model = ModelSpec("resnet_digits", 10, (0.3,), (0.4,)).make(dtype=jnp.bfloat16)
    variables = init_variables(model, (8, 8, 1), jax.random.key(0))
    logits = model.apply({k: variables[k] for k in ("params", "batch_stats")}, jnp.ones((2, 8, 8, 1)), train=False)
    assert logits.dtype == jnp.float32
    exact = (
        ModelSpec("resnet_digits", 10, (0.3,), (0.4,))
        .make()
        .apply({k: variables[k] for k in ("params", "batch_stats")}, jnp.ones((2, 8, 8, 1)), train=False)
    )
    np.testing.assert_allclose(logits, exact, atol=0.1)


def test_convolutions_in_parts_are_the_whole_one(monkeypatch):
    """Forward and both gradients, where a CPU shares a convolution of few channels among its cores."""
    rng = np.random.default_rng(0)
    x, g = (jnp.asarray(rng.normal(size=(8, 6, 6, 4)), jnp.float32) for _ in range(2))
    kernel = jnp.asarray(rng.normal(size=(3, 3, 4, 4)), jnp.float32)

    def both(x, kernel):
        def conv(x, k):
            return layers.convolve(x, k, (1, 1), [(1, 1), (1, 1)], dimension_numbers=("NHWC", "HWIO", "NHWC"))

        out, back = jax.vjp(conv, x, kernel)
        return out, *back(g)

    monkeypatch.setattr(layers.os, "cpu_count", lambda: 4)
    whole = jax.jit(both)(x, kernel)
    monkeypatch.setattr(layers, "_WORTH_A_THREAD", 1)
    in_parts = jax.jit(lambda *v: both(*v))
    assert in_parts.lower(x, kernel).as_text().count("stablehlo.convolution") == 3 * 4
    for a, b in zip(whole, in_parts(x, kernel), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="resnet18"):
        ModelSpec("resnet17", 10, (0.0,), (1.0,)).make()


def test_a_depth_that_is_no_wide_resnet_is_refused():
    from rst_jax.models.wide_resnet import WideResNet

    with pytest.raises(ValueError, match="6 n"):
        shapes(WideResNet(depth=11))


def test_batch_norm_is_pytorchs():
    x = np.random.default_rng(0).normal(2.0, 3.0, (4, 5, 6, 3)).astype(np.float32)
    theirs = torch.nn.BatchNorm2d(3, affine=False)
    ours = BatchNorm()
    stats = ours.init(jax.random.key(0), x, train=False)
    for _ in range(3):
        expected = theirs(torch.tensor(x.transpose(0, 3, 1, 2))).numpy().transpose(0, 2, 3, 1)
        got, stats = ours.apply(stats, x, train=True, mutable=["batch_stats"])
        np.testing.assert_allclose(got, expected, atol=1e-5)
        x = x * 1.5 + 1
    np.testing.assert_allclose(stats["batch_stats"]["mean"], theirs.running_mean, rtol=1e-5)
    np.testing.assert_allclose(stats["batch_stats"]["var"], theirs.running_var, rtol=1e-5)
    theirs.eval()
    expected = theirs(torch.tensor(x.transpose(0, 3, 1, 2))).numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(ours.apply(stats, x, train=False), expected, atol=1e-4)


@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (1, 2)])
def test_convolution_padding_is_pytorchs(size, stride):
    import flax.linen as nn

    from rst_jax.models.layers import conv

    class One(nn.Module):
        dtype = param_dtype = jnp.float32

        @nn.compact
        def __call__(self, x):
            return conv(4, size, stride, self, "conv")(x)

    x = np.random.default_rng(0).normal(size=(2, 7, 8, 3)).astype(np.float32)
    params = One().init(jax.random.key(0), x)
    kernel = np.asarray(params["params"]["conv"]["kernel"]).transpose(3, 2, 0, 1)
    expected = torch.nn.functional.conv2d(
        torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor(kernel), stride=stride, padding=size // 2
    )
    np.testing.assert_allclose(One().apply(params, x), expected.numpy().transpose(0, 2, 3, 1), atol=1e-5)


def test_conv_nets_flatten_channels_first():
    """Against PyTorch's own flatten, with the same random kernels on both sides."""
    model = make("conv2")
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda s: rng.normal(size=s.shape).astype(np.float32) * 0.05, shapes(model, (8, 8, 3))["params"]
    )
    x = rng.uniform(size=(2, 8, 8, 3)).astype(np.float32)
    y = torch.tensor(((x - 0.5) / 0.25).transpose(0, 3, 1, 2))
    for name in ("convs_0", "convs_2"):
        y = torch.relu(torch.conv2d(y, torch.tensor(params[name]["kernel"].transpose(3, 2, 0, 1)), padding=1))
    y = torch.max_pool2d(y, 2).flatten(1)
    for name in ("linear_0", "linear_2", "linear_4"):
        y = y @ torch.tensor(params[name]["kernel"])
        y = y if name == "linear_4" else torch.relu(y)
    np.testing.assert_allclose(model.apply({"params": params}, x), y.numpy(), rtol=1e-3, atol=1e-5)


def test_init_variables_are_three_collections_that_follow_the_key():
    model = ModelSpec("resnet_digits", 10, (0.3,), (0.4,)).make()
    a, b, c = (init_variables(model, (8, 8, 1), jax.random.key(k), pattern="row") for k in (0, 0, 1))
    assert set(a) == {"params", "scores", "batch_stats"}
    assert jax.tree.structure(a["params"]) == jax.tree.structure(a["scores"])
    for x, y, z in zip(*(jax.tree.leaves(v["scores"]) for v in (a, b, c)), strict=True):
        np.testing.assert_array_equal(x, y)
        assert (x != z).any()
    assert float(a["batch_stats"]["bn1"]["var"].sum()) == 64
