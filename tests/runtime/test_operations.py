import math

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import lax
from jax.sharding import PartitionSpec

from rst_jax import subnet
from rst_jax.config import PGDSettings
from rst_jax.initializers import init_variables
from rst_jax.models import ModelSpec
from rst_jax.runtime.mesh import make_mesh
from rst_jax.runtime.operations import has_convolution, operations, step_operations
from rst_jax.threat import ThreatModel
from rst_jax.training.state import TicketState
from rst_jax.training.step import Settings, make_update
from rst_jax.training.target import Scores


def struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def conv(x, kernel, stride=1, padding="SAME", groups=1, dilation=1):
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


A, B = struct(3, 4), struct(4, 5)
PRODUCT = 2 * 3 * 4 * 5


def test_matrix_products():
    assert operations(jnp.matmul, A, B) == PRODUCT
    assert operations(jnp.matmul, struct(7, 3, 4), struct(7, 4, 5)) == 7 * PRODUCT
    assert operations(lambda a, b: jnp.einsum("ijk,kjl->il", a, b), struct(3, 2, 4), struct(4, 2, 5)) == 2 * PRODUCT
    assert operations(lambda a, b: jnp.tanh(a + 1) @ b, A, B) == PRODUCT  # nothing else counts


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("options", "inputs", "side"),
    [
        ({}, 6, 8),
        ({"stride": 2}, 6, 4),
        ({"stride": 3}, 6, 3),
        ({"padding": "VALID"}, 6, 6),
        ({"groups": 3}, 2, 8),
        ({"groups": 3, "stride": 2}, 2, 4),
        ({"groups": 6}, 1, 8),
        ({"dilation": 2}, 6, 8),
    ],
)
def test_convolutions_and_their_gradients(options, inputs, side, dtype):
    """The closed form, and each gradient as long as the forward pass, strides and groups or not."""
    x, kernel = struct(2, 8, 8, 6, dtype=dtype), struct(3, 3, inputs, 12, dtype=dtype)
    forward = 2 * (2 * side * side * 12) * (3 * 3 * inputs)

    def once(x, kernel):
        return conv(x, kernel, **options)

    def loss(x, kernel):
        return jnp.sum(jnp.tanh(once(x, kernel)))  # tanh: the gradient needs the forward pass

    assert operations(once, x, kernel) == forward
    assert operations(jax.grad(loss, 0), x, kernel) == 2 * forward
    assert operations(jax.grad(loss, 1), x, kernel) == 2 * forward
    assert operations(jax.grad(loss, (0, 1)), x, kernel) == 3 * forward


def test_a_transposed_convolution_does_not_count_the_holes():
    kernel = struct(2, 2, 3, 5)
    count = operations(lambda x, k: lax.conv_transpose(x, k, (2, 2), "VALID"), struct(1, 4, 4, 3), kernel)
    assert count == 2 * (4 * 4) * (2 * 2) * 3 * 5


def test_the_gradient_for_the_image_doubles_a_chain():
    shapes = [(3, 3, 3, 8), (3, 3, 8, 16), (1, 1, 16, 4)]

    def chain(x, kernels):
        for kernel, stride in zip(kernels, (1, 2, 2), strict=True):
            x = jax.nn.relu(conv(x, kernel, stride))
        return jnp.sum(jnp.square(x))

    x, kernels = struct(5, 16, 16, 3), [struct(*s) for s in shapes]
    forward = operations(chain, x, kernels)
    assert forward == 2 * 5 * (16 * 16 * 8 * 27 + 8 * 8 * 16 * 72 + 4 * 4 * 4 * 16)
    assert operations(jax.grad(chain), x, kernels) == 2 * forward


def test_programs_within_programs():
    def product(a, b):
        return a @ b

    scanned = struct(6, 3, 4)
    assert operations(jax.jit(jax.jit(product)), A, B) == PRODUCT
    assert operations(jax.checkpoint(product), A, B) == PRODUCT
    assert operations(jax.vmap(product, (0, None)), scanned, B) == 6 * PRODUCT
    assert operations(lambda a, b: lax.scan(lambda c, x: (c, x @ b), 0, a), scanned, B) == 6 * PRODUCT
    assert operations(lambda a, b: lax.map(lambda x: lax.map(lambda y: y @ b, x), a), struct(2, 6, 3, 4), B) == (
        12 * PRODUCT
    )
    assert operations(lambda a, b: lax.cond(a[0, 0] > 0, lambda: a @ b, lambda: (a + a @ b @ b.T) @ b), A, B) == (
        3 * PRODUCT
    )
    assert operations(lambda a, b: lax.switch(1, [product, lambda a, b: (a @ b) * 2], a, b), A, B) == PRODUCT


def test_custom_gradients():
    @jax.custom_jvp
    def forward_rule(a, b):
        return a @ b

    @jax.custom_vjp
    def backward_rule(a, b):
        return a @ b

    forward_rule.defjvp(lambda primals, tangents: (forward_rule(*primals), tangents[0] @ primals[1]))
    backward_rule.defvjp(lambda a, b: (a @ b, (a, b)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))
    assert operations(forward_rule, A, B) == PRODUCT
    assert operations(backward_rule, A, B) == PRODUCT
    assert operations(jax.grad(lambda a, b: jnp.sum(jnp.square(backward_rule(a, b)))), A, B) == 3 * PRODUCT


def test_all_devices_of_a_shard_map():
    rows, whole = PartitionSpec("data"), PartitionSpec()
    split = jax.shard_map(jnp.matmul, mesh=make_mesh(), in_specs=(rows, whole), out_specs=rows)
    alike = jax.shard_map(jnp.matmul, mesh=make_mesh(), in_specs=(whole, whole), out_specs=whole, check_vma=False)
    a = struct(4 * 3, 4)
    assert operations(split, a, B) == 4 * PRODUCT
    assert operations(alike, A, B) == 4 * PRODUCT


def test_a_loop_of_unknown_length_is_refused_if_it_would_count():
    def loop(a, n, body):
        return lax.fori_loop(0, n, body, a)

    square, n = struct(4, 4), struct(dtype=jnp.int32)
    assert operations(lambda a, n: loop(a, n, lambda i, x: x * 2) @ a, square, n) == 2 * 4**3
    assert operations(lambda a: loop(a, 3, lambda i, x: x * 2), square) == 0
    with pytest.raises(ValueError, match="while cannot be counted"):
        operations(lambda a, n: loop(a, n, lambda i, x: x @ a), square, n)


def resnet18_by_hand():
    """Multiply-adds of 3x3 and 1x1 layers: (side of the output, window, inputs, outputs)."""
    layers = [(32, 3, 3, 64), *[(32, 3, 64, 64)] * 4]
    for side, i, o in ((16, 64, 128), (8, 128, 256), (4, 256, 512)):
        layers += [(side, 3, i, o), (side, 1, i, o), *[(side, 3, o, o)] * 3]
    return 2 * (sum(side**2 * window**2 * i * o for side, window, i, o in layers) + 512 * 10)


@pytest.mark.parametrize("batch", [1, 64])
def test_resnet18(batch):
    """Also where layers run in parts of the batch on a CPU; nothing is computed."""
    model = ModelSpec("resnet18", 10, (0.5,) * 3, (0.25,) * 3).make()
    images = struct(batch, 32, 32, 3)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False))
    forward = operations(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]), variables, images)
    assert forward == batch * resnet18_by_hand()
    assert math.isclose(forward / batch, 1.11e9, rel_tol=5e-3)
    assert math.isclose(step_operations(forward, 7) / batch, 18.9e9, rel_tol=5e-3)


@pytest.mark.parametrize("unroll", [True, False])
def test_the_formula_of_a_step_is_the_step(unroll):
    """All but the gradient for the image in the update, which no layer needs from the first one."""
    model = ModelSpec("resnet_digits", 10, (0.3,), (0.4,)).make()
    sgd = optax.sgd(0.1)
    v = jax.eval_shape(lambda: init_variables(model, (16, 16, 1), jax.random.key(0)))
    opt_state = jax.eval_shape(sgd.init, v["scores"])
    state = TicketState(struct(dtype=jnp.int32), v["params"], v["scores"], v["batch_stats"], opt_state)
    images, labels = struct(4, 16, 16, 1), struct(4, dtype=jnp.int32)
    settings = Settings(Scores(), ThreatModel(0.1), PGDSettings(3, 0.05), unroll=unroll)
    counted = operations(
        make_update(model, sgd, settings), state, images, labels, images, subnet.kept_counts(v["scores"], 0.1)
    )
    forward = operations(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]), v, images)
    first = 2 * 4 * 8 * 8 * math.prod(v["params"]["conv1"]["kernel"].shape)
    assert counted == step_operations(forward, 3) - first


def test_a_convolution_is_found_wherever_it_is():
    kernel = jnp.ones((3, 3, 1, 2))

    def convolved(x):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    x = jnp.ones((2, 5, 5, 1))
    assert has_convolution(convolved, x)
    assert has_convolution(lambda x: jax.lax.map(jax.jit(convolved), x[None]), x)
    assert not has_convolution(lambda x: jnp.tanh(x.reshape(2, -1) @ jnp.ones((25, 3))), x)
