"""The threat model: a norm, a radius and the pixel box; random starts, steepest ascent, projection, distance."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp


def _per_example(values: jax.Array, like: jax.Array) -> jax.Array:
    return values.reshape(-1, *(1,) * (like.ndim - 1))


def _norm(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=tuple(range(1, x.ndim))))


@dataclasses.dataclass(frozen=True)
class ThreatModel:
    """What an adversary may do to an image in [lower, upper]: move it by at most eps in the norm.

    Raises:
      ValueError: an unknown norm or a negative eps.
    """

    eps: float
    norm: Literal["linf", "l2"] = "linf"
    lower: float = 0.0
    upper: float = 1.0

    def __post_init__(self) -> None:
        if self.norm not in ("linf", "l2"):
            raise ValueError(f"norm must be 'linf' or 'l2'; got {self.norm!r}.")
        if not self.eps >= 0:
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
        return gradient / (_per_example(_norm(gradient), gradient) + 1e-12)

    def project(self, adversarial: jax.Array, images: jax.Array) -> jax.Array:
        """Into the ball around `images`, then into the box (the images lie in it, so the ball is not left again)."""
        if self.norm == "linf":
            inside = jnp.clip(adversarial, images - self.eps, images + self.eps)
        else:
            delta = adversarial - images
            length = _per_example(_norm(delta), delta)
            inside = images + delta * jnp.minimum(1.0, self.eps / jnp.maximum(length, 1e-12)).astype(delta.dtype)
        return jnp.clip(inside, self.lower, self.upper)

    def distance(self, adversarial: jax.Array, images: jax.Array) -> jax.Array:
        """How far each image was moved, in the norm: [N]."""
        delta = adversarial - images
        if self.norm == "linf":
            return jnp.max(jnp.abs(delta), axis=tuple(range(1, delta.ndim)))
        return _norm(delta)

    def violations(self, adversarial: jax.Array, images: jax.Array, tolerance: float = 1e-6) -> jax.Array:
        """Which images left the ball or the box by more than `tolerance`, or are not finite: bool [N]."""
        axes = tuple(range(1, images.ndim))
        outside = jnp.any((adversarial < self.lower - tolerance) | (adversarial > self.upper + tolerance), axis=axes)
        finite = jnp.all(jnp.isfinite(adversarial), axis=axes)
        return outside | ~finite | (self.distance(adversarial, images) > self.eps + tolerance)
