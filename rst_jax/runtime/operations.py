"""How many operations a program asks for: those of its convolutions and matrix products, by formula."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core
from jaxtyping import PyTree


def operations(function: Callable[..., PyTree], *args: PyTree) -> int:
    """Multiply-adds, counted as two operations each, of all convolutions and matrix products that `function` does.

    A product [m, k] x [k, n] has 2 m k n; a convolution to [N, H, W, out] with kernel [h, w, in / groups, out] has
    2 N H W out h w in / groups, its gradients as many. Padding counts as work; the zeros between dilated elements,
    with which XLA writes the gradients of strided convolutions, do not. A `scan` counts as often as it runs, a `cond`
    as its longest branch, a `shard_map` on all of its devices; what is computed again under remat counts again.

    Args:
      function: pure; it is traced and not run.
      *args: its arguments, trees of arrays or of ShapeDtypeStructs.

    Raises:
      ValueError: a `while` loop, whose length is not known, or a Pallas kernel holds operations.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def has_convolution(function: Callable[..., PyTree], *args: PyTree) -> bool:
    """Whether a convolution is among what `function` does; its arguments are as those of `operations`."""

    def found(jaxpr: core.Jaxpr) -> bool:
        return any(
            equation.primitive.name == "conv_general_dilated" or any(map(found, core.jaxprs_in_params(equation.params)))
            for equation in jaxpr.eqns
        )

    return found(jax.make_jaxpr(function)(*args).jaxpr)


def step_operations(forward: int, attack_steps: int) -> int:
    """What a search step needs: 2 forward-equivalents an attack step, 3 for the update.

    An attack step is a forward pass and the gradient for the image; the update is a forward pass, the gradient
    through the layers and that for their weights, each as long as the forward pass.

    Args:
      forward: operations of one forward pass.
      attack_steps: gradient steps of the attack.
    """
    return forward * (2 * attack_steps + 3)


def _count(jaxpr: core.Jaxpr) -> int:
    return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _product(equation)
    if name == "conv_general_dilated":
        return _convolution(equation)
    inner = [_count(jaxpr) for jaxpr in core.jaxprs_in_params(params)]
    if name == "cond":
        return max(inner)
    if name == "scan":
        return params["length"] * sum(inner)
    if name == "shard_map":
        return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"]) * sum(inner)
    if name in ("while", "pallas_call") and any(inner):
        raise ValueError(f"the operations in a {name} cannot be counted: how often it runs is not in the program.")
    return sum(inner)


def _product(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    summed = [equation.invars[0].aval.shape[axis] for axis in contracted]
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(summed)


def _convolution(equation: Any) -> int:
    (image, kernel), (out,) = ([v.aval.shape for v in side] for side in (equation.invars, equation.outvars))
    dims = equation.params["dimension_numbers"]
    axes = zip(dims.lhs_spec[2:], dims.rhs_spec[2:], dims.out_spec[2:], strict=True)
    planes = math.prod(out[axis] for axis in dims.out_spec[:2])
    return convolution(planes, kernel[dims.rhs_spec[1]], [(image[i], kernel[k], out[o]) for i, k, o in axes])


def convolution(planes: int, inputs: int, axes: Sequence[tuple[int, int, int]]) -> int:
    """Of a convolution to so many planes of an image, each from so many inputs.

    Along each axis (image, window, output): the window's elements, each at as many places as the shorter side has.
    The longer side's other places meet padding or the holes of a dilation. (So a window larger than the image counts
    a little less in the gradient for the kernel than in the forward pass.)
    """
    return 2 * planes * inputs * math.prod(window * min(image, out) for image, window, out in axes)


def outputs(function: Callable[..., PyTree], *args: PyTree) -> int:
    """Elements that the convolutions and matrix products of `function` write: its activations, by formula."""

    def count(jaxpr: core.Jaxpr) -> int:
        total = 0
        equations: Any = jaxpr.eqns
        for equation in equations:
            if equation.primitive.name in ("dot_general", "conv_general_dilated"):
                total += math.prod(equation.outvars[0].aval.shape)
            total += sum(count(inner) for inner in core.jaxprs_in_params(equation.params))
        return total

    return count(jax.make_jaxpr(function)(*args).jaxpr)
