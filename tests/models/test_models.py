import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from rst_jax.initializers import init_variables
from rst_jax.models import MODELS, ModelSpec, layers
from rst_jax.models.layers import BatchNorm, _sums_apart, _sums_together, joined, normalised


def shapes(model, image_shape=(32, 32, 3)):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, *image_shape)), train=False))


def spec(name, classes=10, **arguments):
    return ModelSpec(name, classes, (0.5,), (0.25,), **arguments)


def make(name, classes=10, **arguments):
    return spec(name, classes, **arguments).make()


def kernel_shapes(model):
    leaves = jax.tree_util.tree_leaves_with_path(shapes(model)["params"])
    return {".".join(part.key for part in path[:-1]): leaf.shape for path, leaf in leaves}


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


@pytest.mark.parametrize("name", MODELS)
def test_half_the_width_is_half_of_every_layers_channels(name):
    """Inputs and outputs of every kernel but the image's channels and the classes; at width 1 nothing changes."""
    whole, half = kernel_shapes(make(name)), kernel_shapes(make(name, width=0.5))
    assert whole == kernel_shapes(make(name, width=1.0))
    expected = {
        layer: (*s[:-2], s[-2] // (2 if s[-2] != 3 else 1), s[-1] // (2 if s[-1] != 10 else 1))
        for layer, s in whole.items()
    }
    assert half == expected


def test_the_half_conv4_is_the_released_codes():
    """Its width_mult .5, in our order of axes."""
    assert kernel_shapes(make("conv4", width=0.5)) == {
        "convs_0": (3, 3, 3, 32),
        "convs_2": (3, 3, 32, 32),
        "convs_5": (3, 3, 32, 64),
        "convs_7": (3, 3, 64, 64),
        "linear_0": (4096, 128),
        "linear_2": (128, 128),
        "linear_4": (128, 10),
    }


def test_channels_are_rounded_and_at_least_one():
    assert kernel_shapes(make("wrn10_1", width=0.3))["conv1"] == (3, 3, 3, 5)
    assert kernel_shapes(make("wrn10_1", width=0.01))["conv1"] == (3, 3, 3, 1)
    with pytest.raises(ValueError, match=r"width must be positive.*got 0"):
        shapes(make("conv2", width=0))


def test_rematerialised_blocks_give_the_same_gradients():
    x = jnp.asarray(np.random.default_rng(0).uniform(size=(4, 8, 8, 3)), jnp.float32)
    for name in ("resnet_digits", "wrn10_1"):
        variables = make(name).init(jax.random.key(0), x, train=False)
        found = []
        for remat in (False, True):
            model = spec(name).make(remat=remat)

            def loss(params, stats=variables["batch_stats"], model=model):
                logits, _ = model.apply(
                    {"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"]
                )
                return jnp.square(logits).mean()

            lowered = jax.jit(jax.grad(loss))
            assert ("remat" in str(jax.make_jaxpr(jax.grad(loss))(variables["params"]))) == remat
            found.append(lowered(variables["params"]))
        assert jax.tree.structure(found[0]) == jax.tree.structure(found[1])
        for a, b in zip(*map(jax.tree.leaves, found), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_specification_survives_json_and_is_hashable():
    plain = spec("resnet18")
    other = spec("resnet18", width=0.5, blocks=[1, 1], widths=[8, 16])
    for each in (plain, other):
        again = ModelSpec(**json.loads(json.dumps(each.to_dict())))
        assert again == each
        assert hash(again) == hash(each)
        assert ModelSpec(**each.to_dict()) == each
    assert len({plain, other, spec("resnet18", width=0.5)}) == 3
    assert list(plain.to_dict()) == ["name", "num_classes", "mean", "std"]
    assert other.arguments == (("blocks", (1, 1)), ("width", 0.5), ("widths", (8, 16)))
    assert kernel_shapes(other.make())["layer2_0.conv2"] == (3, 3, 8, 8)


@pytest.mark.parametrize(
    ("name", "argument", "words"),
    [
        ("conv4", "widht", "'conv4' takes no argument 'widht'; did you mean 'width'"),
        ("wrn10_1", "depths", "did you mean 'depth'"),
        ("wrn10_1", "bottleneck", "it takes width, depth, widen"),
        ("resnet18", "dtype", "takes no argument 'dtype'"),
        ("resnet18", "remat", "takes no argument 'remat'"),
    ],
)
def test_an_argument_that_the_network_does_not_take_is_refused(name, argument, words):
    with pytest.raises(ValueError, match=words):
        spec(name, **{argument: 1})


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
    stats = ours.init(jax.random.key(0), jnp.asarray(x), train=False)
    for _ in range(3):
        expected = theirs(torch.tensor(x.transpose(0, 3, 1, 2))).numpy().transpose(0, 2, 3, 1)
        got, stats = ours.apply(stats, jnp.asarray(x), train=True, mutable=["batch_stats"])
        np.testing.assert_allclose(got, expected, atol=1e-5)
        x = x * 1.5 + 1
    np.testing.assert_allclose(stats["batch_stats"]["mean"], theirs.running_mean, rtol=1e-5)
    np.testing.assert_allclose(stats["batch_stats"]["var"], theirs.running_var, rtol=1e-5)
    theirs.eval()
    expected = theirs(torch.tensor(x.transpose(0, 3, 1, 2))).numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(ours.apply(stats, jnp.asarray(x), train=False), expected, atol=1e-4)


def two_passes(x, epsilon=1e-5):
    """Mean, then variance, as the definition has it; differentiated by JAX."""
    axes = tuple(range(x.ndim - 1))
    mean = x.mean(axes)
    return (x - mean) / jnp.sqrt(jnp.square(x - mean).mean(axes) + epsilon)


@pytest.mark.parametrize("shape", [(4, 5, 6, 3), (2, 3), (1, 1, 1, 2)])
def test_normalised_and_its_gradient_are_the_definitions(shape):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, g = (jnp.asarray(rng.normal(2.0, 3.0, shape)) for _ in range(2))
        shift = jnp.asarray(rng.normal(size=shape[-1:]))
        y, pull_back = jax.vjp(two_passes, x)
        got, mean, var = normalised(x, shift, 1e-5, None)
        np.testing.assert_allclose(got, y, atol=1e-12)
        np.testing.assert_allclose(mean, x.mean(tuple(range(x.ndim - 1))), atol=1e-12)
        np.testing.assert_allclose(var, x.var(tuple(range(x.ndim - 1))), atol=1e-12)
        (gradient,) = jax.vjp(lambda x: normalised(x, shift, 1e-5, None)[0], x)[1](g)
        np.testing.assert_allclose(gradient, pull_back(g)[0], atol=1e-12)


@pytest.mark.parametrize(("away", "most"), [(0, 1e-6), (1, 1e-6), (30, 1e-3), (1000, 1e-6)])
def test_the_variance_of_a_channel_far_from_zero_is_right_once_the_running_mean_is_near(away, most):
    """In float32, 1,000 deviations from zero; the running mean starts there and is `away` deviations off."""
    x = np.random.default_rng(0).normal(1000.0, 1.0, (32, 8, 8, 2)).astype(np.float32)
    exact = x.astype(np.float64).var((0, 1, 2))
    if away < 1000:
        _, mean, var = normalised(jnp.asarray(x), jnp.full(2, 1000.0 - away, jnp.float32), 1e-5, None)
    else:  # after a hundred passes over such images
        norm = BatchNorm()
        stats = norm.init(jax.random.key(0), jnp.asarray(x), train=False)
        for _ in range(100):
            _, stats = norm.apply(stats, jnp.asarray(x), train=True, mutable=["batch_stats"])
        mean, var = x.mean((0, 1, 2)), normalised(jnp.asarray(x), stats["batch_stats"]["mean"], 1e-5, None)[2]
    np.testing.assert_allclose(var, exact, rtol=most)
    np.testing.assert_allclose(mean, x.astype(np.float64).mean((0, 1, 2)), rtol=1e-6)


def test_a_channel_that_is_constant_stays_finite():
    y, _, var = normalised(jnp.full((8, 4, 4, 2), 1234.567), jnp.zeros(2), 1e-5, None)
    assert (np.asarray(var) >= 0).all()
    assert np.isfinite(y).all()


@pytest.mark.parametrize("shape", [(4, 5, 6, 3), (7, 3), (2, 64, 64, 2)])
def test_sums_of_one_reduction_are_those_of_two(shape):
    a, b = (jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32) for seed in (0, 1))
    for one, other in zip(_sums_together(a, b), _sums_apart(a, b), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_the_end_of_a_residual_block_has_the_gradient_of_a_rectified_sum():
    x, y, g = (jnp.asarray(np.random.default_rng(seed).normal(size=(3, 4)), jnp.float32) for seed in range(3))
    x = x.at[0].set(-y[0])  # at zero it is zero
    out, pull_back = jax.vjp(lambda x, y: jax.nn.relu(x + y), x, y)
    ours, ours_back = jax.vjp(joined, x, y)
    np.testing.assert_array_equal(ours, out)
    for one, other in zip(ours_back(g), pull_back(g), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (1, 2)])
def test_convolution_padding_is_pytorchs(size, stride):
    import flax.linen as nn

    from rst_jax.models.layers import conv

    class One(nn.Module):
        @nn.compact
        def __call__(self, x):
            return conv(4, size, stride, name="conv")(x)

    x = np.random.default_rng(0).normal(size=(2, 7, 8, 3)).astype(np.float32)
    params = One().init(jax.random.key(0), x)
    kernel = np.asarray(params["params"]["conv"]["kernel"]).transpose(3, 2, 0, 1)
    expected = torch.nn.functional.conv2d(
        torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor(kernel), stride=stride, padding=size // 2
    )
    np.testing.assert_allclose(One().apply(params, jnp.asarray(x)), expected.numpy().transpose(0, 2, 3, 1), atol=1e-5)


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
    np.testing.assert_allclose(model.apply({"params": params}, jnp.asarray(x)), y.numpy(), rtol=1e-3, atol=1e-5)


def test_init_variables_are_three_collections_that_follow_the_key():
    model = ModelSpec("resnet_digits", 10, (0.3,), (0.4,)).make()
    a, b, c = (init_variables(model, (8, 8, 1), jax.random.key(k), pattern="row") for k in (0, 0, 1))
    assert set(a) == {"params", "scores", "batch_stats"}
    assert jax.tree.structure(a["params"]) == jax.tree.structure(a["scores"])
    for x, y, z in zip(*(jax.tree.leaves(v["scores"]) for v in (a, b, c)), strict=True):
        np.testing.assert_array_equal(x, y)
        assert (x != z).any()
    assert float(a["batch_stats"]["bn1"]["var"].sum()) == 64
