"""What a run carries from step to step, and the optimiser that moves it."""

import math
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from rst_jax import config as config_lib
from rst_jax import initializers
from rst_jax.subnet import is_kernel

Tree = Any


@flax.struct.dataclass
class TicketState:
    """Everything that a step reads and writes.

    Attributes:
      step: steps done, int32.
      params: the weights; frozen in a search.
      scores: what a search trains; fixed in fine-tuning and dense training.
      batch_stats: running statistics.
      opt_state: optax's.
    """

    step: jax.Array
    params: Tree
    scores: Tree
    batch_stats: Tree
    opt_state: Tree


def make_schedule(optimizer: config_lib.Optimizer, epochs: int, steps_per_epoch: int) -> optax.Schedule:
    """The learning rate of each step.

    piecewise: multiplied by decay_factor at each boundary; multistep: every `decay_every` epochs; cosine: to 0 at
    the end (Loshchilov and Hutter, 2017); linear: likewise (with a long warm-up the cyclic rate of Wong et al., 2020).
    Warm-up is linear. With unit "epoch" the rate is constant within an
    epoch, as in the released code.
    """
    o = optimizer

    def rate(step: Any) -> jax.Array:
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


def make_optimizer(optimizer: config_lib.Optimizer, schedule: optax.Schedule) -> optax.GradientTransformation:
    """SGD with momentum; the decay is added to the gradient before the momentum, as PyTorch does."""
    return optax.chain(
        optax.add_decayed_weights(optimizer.weight_decay),
        optax.sgd(schedule, momentum=optimizer.momentum or None, nesterov=optimizer.nesterov),
    )


def init_variables(
    model: nn.Module,
    image_shape: tuple[int, ...],
    key: jax.Array,
    *,
    pattern: config_lib.Pattern = "element",
    weight_init: str = "signed_kaiming_constant",
    fan_scale: float = 1.0,
) -> dict[str, Tree]:
    """The three collections of a network that nobody trained: params, scores, batch_stats.

    Kernels and scores are drawn from keys of their own layers; other parameters are the module's.

    Args:
      model: any Flax module with a `train` argument.
      image_shape: [H, W, C].
      key: a PRNG key.
      pattern, weight_init: as in the configuration.
      fan_scale: the remaining ratio under `scale_fan`, else 1.
    """
    images = jnp.zeros((1, *image_shape))
    shapes = jax.eval_shape(lambda k: model.init(k, images, train=False), key)

    def rest(k: jax.Array) -> Tree:
        """What the module sets itself; XLA drops the kernels' own initialisation."""
        made = model.init(k, images, train=False)
        others = jax.tree_util.tree_map_with_path(
            lambda path, leaf: None if is_kernel(path, leaf) else leaf, made["params"]
        )
        return others, made.get("batch_stats", {})

    def everything(k: jax.Array) -> dict[str, Tree]:
        others, batch_stats = rest(k)
        params = jax.tree.map(
            lambda own, struct: struct if own is None else own,
            others,
            shapes["params"],
            is_leaf=lambda x: x is None,
        )
        weight_key, score_key = jax.random.split(k)
        dtype = jax.tree.leaves(shapes["params"])[0].dtype
        return {
            "params": initializers.draw_weights(weight_key, params, weight_init, fan_scale),
            "scores": initializers.draw_scores(score_key, shapes["params"], pattern, dtype),
            "batch_stats": batch_stats,
        }

    return jax.jit(everything)(key)
