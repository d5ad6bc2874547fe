"""The threat model: a norm, a radius and the pixel box; random starts, steepest ascent, projection, distance."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp


def per_example(values: jax.Array, like: jax.Array) -> jax.Array:
    """[N] as [N, 1, ...], to go with an array [N, ...]."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))


def l2_norm(x: jax.Array) -> jax.Array:
    """The Euclidean norm of each example: [N] of [N, ...]."""
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=pixels(x)))


def pixels(x: jax.Array) -> tuple[int, ...]:
    """The axes of [N, ...] but the first; on a CPU, sums over them all are quicker than over one long axis."""
    return tuple(range(1, x.ndim))


@dataclasses.dataclass(frozen=True)
class ThreatModel:
    """What an adversary may do to an image in [lower, upper]: move it by at most eps in the norm.

    Inside a compiled program eps may be a traced scalar, so that one program serves every radius.

    Raises:
      ValueError: an unknown norm or a negative eps.
    """

    eps: float | jax.Array
    norm: Literal["linf", "l2"] = "linf"
    lower: float = 0.0
    upper: float = 1.0

    def __post_init__(self) -> None:
        if self.norm not in ("linf", "l2"):
            raise ValueError(f"norm must be 'linf' or 'l2'; got {self.norm!r}.")
        if not isinstance(self.eps, jax.Array) and not self.eps >= 0:
            raise ValueError(f"eps must be at least 0; got {self.eps}.")

    def noise(self, keys: jax.Array, images: jax.Array) -> jax.Array:
        """A uniform draw from the ball for each image, from its own key: [N, ...] for keys [N]."""
        shape, dtype = images.shape[1:], images.dtype
        if self.norm == "linf":
            return jax.vmap(lambda k: jax.random.uniform(k, shape, dtype, -self.eps, self.eps))(keys)

        def ball(key: jax.Array) -> jax.Array:
            direction, radius = jax.random.split(key)
            z = jax.random.normal(direction, shape, dtype)
            r = jax.random.uniform(radius, (), dtype) ** (1 / z.size)
            return self.eps * r * z / jnp.linalg.norm(z.reshape(-1))

        return jax.vmap(ball)(keys)

    def steepest(self, gradient: jax.Array) -> jax.Array:
        """The unit step along which a linear function grows fastest: sign, or the gradient over its norm."""
        if self.norm == "linf":
            return jnp.sign(gradient)
        return self.unit(gradient)

    def unit(self, x: jax.Array) -> jax.Array:
        """x over its norm: [N, ...] of norm one each (zero stays zero)."""
        length = jnp.max(jnp.abs(x), axis=pixels(x), initial=0) if self.norm == "linf" else l2_norm(x)
        return x / (per_example(length, x) + 1e-12)

    def clip(self, x: jax.Array) -> jax.Array:
        """Into the box."""
        return jnp.clip(x, self.lower, self.upper)

    def ascend(
        self, adversarial: jax.Array, gradient: jax.Array, size: jax.Array | float, images: jax.Array
    ) -> jax.Array:
        """A step of `size` (a number, or [N, 1, ...]) along the steepest ascent, projected."""
        return self.project(adversarial + size * self.steepest(gradient), images)

    def project(self, adversarial: jax.Array, images: jax.Array) -> jax.Array:
        """Into the ball around `images`, then into the box (the images lie in it, so the ball is not left again)."""
        if self.norm == "linf":
            inside = jnp.clip(adversarial, images - self.eps, images + self.eps)
        else:
            delta = adversarial - images
            length = per_example(l2_norm(delta), delta)
            inside = images + delta * jnp.minimum(1.0, self.eps / jnp.maximum(length, 1e-12)).astype(delta.dtype)
        return self.clip(inside)

    def distance(self, adversarial: jax.Array, images: jax.Array) -> jax.Array:
        """How far each image was moved, in the norm: [N]."""
        delta = adversarial - images
        return jnp.max(jnp.abs(delta), axis=pixels(delta), initial=0) if self.norm == "linf" else l2_norm(delta)

    def violations(self, adversarial: jax.Array, images: jax.Array, tolerance: float = 1e-6) -> jax.Array:
        """Which images left the ball or the box by more than `tolerance`, or are not finite: bool [N]."""
        axes = pixels(images)
        outside = jnp.any((adversarial < self.lower - tolerance) | (adversarial > self.upper + tolerance), axis=axes)
        finite = jnp.all(jnp.isfinite(adversarial), axis=axes)
        return outside | ~finite | (self.distance(adversarial, images) > self.eps + tolerance)
