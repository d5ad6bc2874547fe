"""Losses and correctness, one value an example: [N, classes] logits and [N] integer labels to [N]."""

import jax
import jax.numpy as jnp
from jax import lax


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """-sum_c q_c log softmax(logits)_c, q = (1 - smoothing) on the label + smoothing spread over all classes."""
    log_p = jax.nn.log_softmax(logits)
    at_label = at(log_p, labels)
    if not smoothing:
        return -at_label
    return -((1 - smoothing) * at_label + smoothing * jnp.mean(log_p, axis=-1))


def margin(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """z_y - max_{i != y} z_i: how far the label's logit is above the next; negative where it is not the largest."""
    mine = at(logits, labels)
    others = jnp.where(one_hot(labels, logits), -jnp.inf, logits)
    return mine - jnp.max(others, axis=-1)


def dlr(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Difference of logits ratio (Croce and Hein, 2020, eq. 6): -margin / (z_1 - z_3), over descending logits.

    It is the same for shifted and scaled logits. With two classes there is no third: -margin.
    """
    if logits.shape[-1] < 3:
        return -margin(logits, labels)
    first, _, third = largest(logits, 3)
    return -margin(logits, labels) / (first - third + 1e-12)


def targeted_dlr(logits: jax.Array, labels: jax.Array, targets: jax.Array) -> jax.Array:
    """Targeted DLR (Croce and Hein, 2020, eq. 7): -(z_y - z_t) / (z_1 - (z_3 + z_4) / 2), over descending logits.

    With fewer than four classes there is no fourth: z_t - z_y.
    """
    ahead = at(logits, targets) - at(logits, labels)
    if logits.shape[-1] < 4:
        return ahead
    first, _, third, fourth = largest(logits, 4)
    return ahead / (first - 0.5 * (third + fourth) + 1e-12)


def at(logits: jax.Array, classes: jax.Array) -> jax.Array:
    """The logit of one class an example: [N] of [N, classes] and integers [N]."""
    return jnp.sum(jnp.where(one_hot(classes, logits), logits, 0), axis=-1)


def one_hot(classes: jax.Array, logits: jax.Array) -> jax.Array:
    """Which logit is the class's: bool [N, classes] of integers [N]."""
    return jax.nn.one_hot(classes, logits.shape[-1], dtype=bool)


def largest(logits: jax.Array, count: int) -> list[jax.Array]:
    """The `count` largest logits of each example, in descending order, each [N]; for a few, quicker than a sort."""
    found = []
    for _ in range(count):
        top = lax.argmax(logits, logits.ndim - 1, jnp.int32)
        found.append(at(logits, top))
        logits = jnp.where(one_hot(top, logits), -jnp.inf, logits)
    return found


def correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Whether the largest logit (the first of equals) is the label's: bool [N]; what is not finite is never right."""
    return (lax.argmax(logits, logits.ndim - 1, labels.dtype) == labels) & jnp.isfinite(logits).all(-1)
