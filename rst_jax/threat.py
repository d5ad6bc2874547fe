"""The threat model: a norm, a radius and the pixel box; random starts, steepest ascent, projection, distance.

All but the noise works by the same lines on arrays of examples [N, ...] of NumPy, on the host, and of JAX, in programs;
a result is of the kind of the arguments.
"""

import dataclasses
import math
from typing import Annotated, Any, Literal

import jax
from jaxtyping import Bool, Float, Key, Shaped

from rst_jax.ranges import Range

Array = Any  # NumPy's or JAX's
Images = Float[Array, "n *pixels"]
_ROUNDING = 1e-6  # of float32 images, over the largest value of the box or 1


def per_example(values: Shaped[Array, " n"], like: Shaped[Array, "n ..."]) -> Shaped[Array, "n ..."]:
    """[N] as [N, 1, ...], to go with an array [N, ...]."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))


def l2_norm(x: Float[Array, "n ..."]) -> Float[Array, " n"]:
    """The Euclidean norm of each example: [N] of [N, ...]."""
    return x.__array_namespace__().sqrt((x * x).sum(axis=pixels(x)))


def pixels(x: Shaped[Array, "n ..."]) -> tuple[int, ...]:
    """The axes of [N, ...] but the first; on a CPU, sums over them all are quicker than over one long axis."""
    return tuple(range(1, x.ndim))


def ball(sampled: Float[Array, "n numbers"], like: Images) -> Images:
    """Uniform points of the unit L2 ball, [N, ...], of normal samples [N, pixels + 2].

    Over their norm the samples are uniform on a sphere, and so is in the ball what is left of it without two
    coordinates.
    """
    return (sampled[:, :-2] / per_example(l2_norm(sampled), sampled)).reshape(like.shape)


@dataclasses.dataclass(frozen=True)
class ThreatModel:
    """What an adversary may do to an image in [lower, upper]: move it by at most eps in the norm.

    Inside a compiled program eps may be a traced scalar, so that one program serves every radius.

    Raises:
      ValueError: an unknown norm, a negative eps, or a box that is none.
    """

    eps: Annotated[float | jax.Array, Range(0, 1e4)]
    norm: Literal["linf", "l2"] = "linf"
    lower: Annotated[float, Range(-1e4, 1e4)] = 0.0
    upper: Annotated[float, Range(-1e4, 1e4)] = 1.0

    def __post_init__(self) -> None:
        if self.norm not in ("linf", "l2"):
            raise ValueError(f"norm must be 'linf' or 'l2'; got {self.norm!r}.")
        for name in ("eps", "lower", "upper"):  # numbers of NumPy's would make float64 of float32 images
            if not isinstance(getattr(self, name), jax.core.Tracer):
                object.__setattr__(self, name, float(getattr(self, name)))
        if not isinstance(self.eps, jax.core.Tracer) and not self.eps >= 0:
            raise ValueError(f"eps must be at least 0; got {self.eps}.")
        if not -math.inf < self.lower < self.upper < math.inf:
            raise ValueError(f"the box must be two finite numbers, lower < upper; got {self.lower}, {self.upper}.")

    def check_reach(self, image_shape: tuple[int, ...], name: str = "eps") -> None:
        """Refuse a radius beyond `reach`, which is mostly one in other units.

        Raises:
          ValueError: says what can be reached.
        """
        if not float(self.eps) <= (reach := self.reach(image_shape)):
            raise ValueError(
                f"{name} must be at most {reach:.4g}, where every image of [{self.lower:g}, {self.upper:g}] can be "
                f"reached; got {float(self.eps):g}. It is in the units of the images: eight of 255 levels are 8 / 255 "
                "where images lie in [0, 1]."
            )

    def reach(self, image_shape: tuple[int, ...]) -> float:
        """The radius from which every image of the box can be made of every other."""
        return (self.upper - self.lower) * (1 if self.norm == "linf" else math.prod(image_shape) ** 0.5)

    def noise(self, keys: Key[jax.Array, " n"], images: Images) -> Images:
        """A uniform sample from the ball for each image, from its own key: [N, ...] for keys [N]."""
        shape, dtype = images.shape[1:], images.dtype
        if self.norm == "linf":
            return jax.vmap(lambda k: jax.random.uniform(k, shape, dtype, -self.eps, self.eps))(keys)
        return self.eps * ball(jax.vmap(lambda k: jax.random.normal(k, (images[0].size + 2,), dtype))(keys), images)

    def steepest(self, gradient: Images) -> Images:
        """The unit step along which a linear function grows fastest: sign, or the gradient over its norm."""
        return gradient.__array_namespace__().sign(gradient) if self.norm == "linf" else self.unit(gradient)

    def unit(self, x: Images) -> Images:
        """x over its norm: [N, ...] of norm one each (zero stays zero)."""
        return x / (per_example(self.length(x), x) + 1e-12)

    def clip(self, x: Images) -> Images:
        """Into the box."""
        return x.clip(self.lower, self.upper)

    def ascend(self, adversarial: Images, gradient: Images, size: Array | float, images: Images) -> Images:
        """A step of `size` (a number, or [N, 1, ...]) along the steepest ascent, projected."""
        return self.project(adversarial + size * self.steepest(gradient), images)

    def project(self, adversarial: Images, images: Images) -> Images:
        """Into the ball around `images`, then into the box (the images lie in it, so the ball is not left again)."""
        if self.norm == "linf":
            return self.clip(adversarial.clip(images - self.eps, images + self.eps))
        delta, xp = adversarial - images, adversarial.__array_namespace__()
        shrink = xp.minimum(1.0, self.eps / xp.maximum(l2_norm(delta), 1e-12)).astype(delta.dtype)
        return self.clip(images + delta * per_example(shrink, delta))

    def length(self, move: Images) -> Float[Array, " n"]:
        """Of each move, its norm: [N] of [N, ...]."""
        return abs(move).max(axis=pixels(move), initial=0) if self.norm == "linf" else l2_norm(move)

    def distance(self, adversarial: Images, images: Images) -> Float[Array, " n"]:
        """How far each image was moved, in the norm: [N]."""
        return self.length(adversarial - images)

    def violations(self, adversarial: Images, images: Images) -> Bool[Array, " n"]:
        """Which images left the ball or the box by more than float32 rounds, or are not finite: bool [N]."""
        # Comparisons that hold of no NaN.
        slack = _ROUNDING * max(1, abs(self.lower), abs(self.upper))
        inside = (adversarial >= self.lower - slack) & (adversarial <= self.upper + slack)
        near = self.distance(adversarial, images) <= self.eps + slack
        return ~(inside.all(axis=pixels(images)) & near)
