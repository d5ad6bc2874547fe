"""The outer minimisation: SGD as PyTorch has it, and the schedules of its rate."""

import math

import jax
import jax.numpy as jnp
import optax

from rst_jax.config import Optimizer


def make_schedule(optimizer: Optimizer, epochs: int, steps_per_epoch: int) -> optax.Schedule:
    """The learning rate of each step.

    piecewise: multiplied by decay_factor at each boundary; multistep: every `decay_every` epochs; cosine: to 0 at
    the end (Loshchilov and Hutter, 2017); linear: likewise (with a long warm-up the cyclic rate of Wong et al., 2020).
    Warm-up is linear. With unit "epoch" the rate is constant within an epoch, as in the released code.
    """
    o = optimizer

    def rate(step: jax.Array | int) -> jax.Array:
        time = jnp.asarray(step, jnp.int32) / steps_per_epoch
        time = jnp.floor(time + 1e-6) if o.unit == "epoch" else time
        if o.schedule in ("cosine", "linear"):
            progress = jnp.clip((time - o.warmup_epochs) / max(epochs - o.warmup_epochs, 1), 0.0, 1.0)
            factor = 0.5 * (1 + jnp.cos(math.pi * progress)) if o.schedule == "cosine" else 1 - progress
        else:
            boundaries = o.boundaries if o.schedule == "piecewise" else range(o.decay_every, epochs + 1, o.decay_every)
            passed = sum((time >= boundary).astype(jnp.float32) for boundary in boundaries) + jnp.zeros(())
            factor = jnp.float32(o.decay_factor) ** passed
        if o.warmup_epochs:
            ahead = 1.0 if o.unit == "epoch" else 0.0
            factor = jnp.where(time < o.warmup_epochs, (time + ahead) / o.warmup_epochs, factor)
        return o.learning_rate * factor

    return rate


def make_optimizer(optimizer: Optimizer, schedule: optax.Schedule) -> optax.GradientTransformation:
    """SGD with momentum; the decay is added to the gradient before the momentum, as PyTorch does."""
    return optax.chain(
        optax.add_decayed_weights(optimizer.weight_decay),
        optax.sgd(schedule, momentum=optimizer.momentum or None, nesterov=optimizer.nesterov),
    )
