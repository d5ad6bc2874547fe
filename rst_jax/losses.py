"""Losses and correctness, one value an example: [N, classes] logits and [N] integer labels to [N]."""

import jax
import jax.numpy as jnp
from jax import lax


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """-sum_c q_c log softmax(logits)_c, q = (1 - smoothing) on the label + smoothing spread over all classes."""
    log_p = jax.nn.log_softmax(logits)
    at_label = jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]
    if not smoothing:
        return -at_label
    return -((1 - smoothing) * at_label + smoothing * jnp.mean(log_p, axis=-1))


def correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Whether the largest logit (the first of equals) is the label's: bool [N]."""
    return lax.argmax(logits, logits.ndim - 1, labels.dtype) == labels
