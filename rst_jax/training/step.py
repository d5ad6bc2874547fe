"""The training step.

One step serves search, fine-tuning and dense training: materialise the weights once, attack them, take the
gradient of the loss at the adversarial images, and update the target. Over the mesh
it runs as `shard_map`: the attack uses each device's own batch statistics and no collective; one all-reduce
of gradient, statistics and metrics ends the step.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Literal

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import PyTree

from rst_jax.attacks import pgd
from rst_jax.config import PGDSettings
from rst_jax.data.pipeline import Images, augment, example_keys
from rst_jax.losses import correct, cross_entropy
from rst_jax.runtime.mesh import AXIS, on_gpu
from rst_jax.threat import ThreatModel
from rst_jax.training.state import TicketState
from rst_jax.training.target import Target

_Batch = tuple[jax.Array, jax.Array, jax.Array | None]  # images, labels, noise


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the step is made from besides the model and the optimiser.

    Attributes:
      target: what is trained.
      threat: the adversary's.
      attack: the inner maximisation.
      batch_norm: under attack, the batch's statistics (the running ones move at each forward) or the running ones.
      label_smoothing: of the criterion and of the attack's.
      crop_padding, flip: augmentation; see `data.pipeline.augment`.
      accumulate: parts of a device's batch that are attacked and differentiated one after the other; their gradients
        are averaged, and batch statistics are of a part.
      unroll: the attack as a flat program.
    """

    target: Target
    threat: ThreatModel
    attack: PGDSettings
    batch_norm: Literal["train", "eval"] = "train"
    label_smoothing: float = 0.0
    crop_padding: int = 0
    flip: bool = False
    accumulate: int = 1
    unroll: bool = False


def make_part(model: nn.Module, settings: Settings) -> Callable[..., tuple[PyTree, PyTree, dict[str, jax.Array]]]:
    """Attack some images and differentiate there: `part(weights, stats, (images, labels, noise))`.

    It returns the gradient of the mean loss with respect to the weights, the statistics after all its forward passes,
    and the metrics of `make_update`.
    """
    s = settings
    loss_of = partial(cross_entropy, smoothing=s.label_smoothing)

    def forward(weights: PyTree, images: jax.Array, stats: PyTree) -> tuple[jax.Array, PyTree]:
        logits, changed = _in_training(model, weights, images, stats)
        return logits, changed.get("batch_stats", stats)

    def attack(
        weights: PyTree, images: jax.Array, labels: jax.Array, noise: jax.Array | None, stats: PyTree
    ) -> tuple[jax.Array, PyTree]:
        run = partial(
            pgd,
            images=images,
            labels=labels,
            threat=s.threat,
            settings=s.attack,
            start=noise,
            loss=loss_of,
            unroll=s.unroll,
        )
        if s.batch_norm == "train":
            return run(partial(forward, weights), memory=stats)
        return run(lambda x: model.apply({"params": weights, "batch_stats": stats}, x, train=False)), stats

    def part(weights: PyTree, stats: PyTree, batch: _Batch) -> tuple[PyTree, PyTree, dict[str, jax.Array]]:
        images, labels, noise = batch
        with jax.named_scope("attack"):
            adversarial, stats = attack(weights, images, labels, noise, stats)
        adversarial = lax.stop_gradient(adversarial)

        def loss_at(weights: PyTree) -> tuple[jax.Array, tuple[PyTree, dict[str, jax.Array]]]:
            logits, after = forward(weights, adversarial, stats)
            losses = loss_of(logits, labels)
            metrics = {
                "loss": jnp.sum(losses).astype(jnp.float32),
                "correct": jnp.sum(correct(logits, labels), dtype=jnp.float32),
                "count": jnp.float32(labels.shape[0]),
            }
            return jnp.mean(losses), (after, metrics)

        with jax.named_scope("gradient"):
            gradient, (stats, metrics) = jax.grad(loss_at, has_aux=True)(weights)
        return gradient, stats, metrics

    return part


def make_update(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    settings: Settings,
    axis: str | None = None,
    cast: bool = False,
) -> Callable[..., tuple[TicketState, dict[str, jax.Array]]]:
    """The step on one batch: `update(state, images, labels, noise, selection) -> (state, metrics)`.

    Args of the result:
      state: a TicketState.
      images: [N, H, W, C] in [0, 1]; labels: int [N].
      noise: where the attack starts, relative to the images; None starts at them.
      selection: what the target makes masks from: kept counts of every layer (a search), or fixed masks.
    Metrics are sums over the batch: loss, correct (on adversarial images), count.

    Args:
      axis: the mesh axis to reduce over; None outside shard_map.
      cast: give the network its weights in the types that it computes in, cast once a step and not once a pass. (On
        TPUs they would push activations out of the chip; and a sum over parts wants gradients in full precision.)
    """
    s, differentiate = settings, make_part(model, settings)

    def update(
        state: TicketState, images: jax.Array, labels: jax.Array, noise: jax.Array | None, selection: PyTree
    ) -> tuple[TicketState, dict[str, jax.Array]]:
        chex.assert_rank([images, labels], [4, 1])
        with jax.named_scope("masks"):
            masks, trained = s.target.masks(state, selection), s.target.trained(state)

        def made(trained: PyTree) -> PyTree:
            weights = s.target.weights(state, trained, masks)
            return _as_used(weights, partial(_in_training, model), images, state.batch_stats) if cast else weights

        with jax.named_scope("masks"):
            weights, pull_back = jax.vjp(made, trained)
        part, batch, stats = partial(differentiate, weights), (images, labels, noise), state.batch_stats
        if s.accumulate == 1:
            gradient, stats, metrics = part(stats, batch)
        else:
            parts = jax.tree.map(lambda x: x.reshape(s.accumulate, -1, *x.shape[1:]), batch)
            gradient, stats, metrics = _summed(part, stats, parts)
            gradient = jax.tree.map(lambda g: g / s.accumulate, gradient)
        with jax.named_scope("update"):
            (gradient,) = pull_back(gradient)
            if axis:
                gradient, stats = lax.pmean((gradient, stats), axis)
                metrics = lax.psum(metrics, axis)
            updates, opt_state = optimizer.update(gradient, state.opt_state, trained)
            state = s.target.updated(state, optax.apply_updates(trained, s.target.allowed(updates, masks)))
        return state.replace(step=state.step + 1, batch_stats=stats, opt_state=opt_state), metrics  # type: ignore[attr-defined]

    return update


def _in_training(model: nn.Module, weights: PyTree, images: jax.Array, stats: PyTree) -> tuple[jax.Array, PyTree]:
    """Logits, and the collections that a forward pass changes."""
    return model.apply({"params": weights, "batch_stats": stats}, images, train=True, mutable=["batch_stats"])


def _as_used(weights: PyTree, function: Callable[..., PyTree], *arguments: PyTree) -> PyTree:
    """The weights in the types to which `function(weights, *arguments)` casts them before it does anything else."""
    leaves, tree = jax.tree.flatten(weights)
    jaxpr = jax.make_jaxpr(function)(weights, *arguments).jaxpr

    def type_of(leaf: jax.Array, place: int) -> jnp.dtype:
        uses = [e for e in jaxpr.eqns if any(v is jaxpr.invars[place] for v in e.invars)]
        types = {e.params["new_dtype"] if e.primitive.name == "convert_element_type" else leaf.dtype for e in uses}
        return types.pop() if len(types) == 1 else leaf.dtype

    return jax.tree.unflatten(tree, [leaf.astype(type_of(leaf, place)) for place, leaf in enumerate(leaves)])


def _summed(part: Callable, stats: PyTree, parts: tuple) -> tuple[PyTree, PyTree, dict[str, jax.Array]]:
    """Gradients and metrics of `part` summed over the leading axis, one part in memory at a time."""

    def body(carry: tuple, batch: tuple) -> tuple[tuple, None]:
        total, stats = carry
        gradient, stats, metrics = part(stats, batch)
        return (jax.tree.map(jnp.add, total, (gradient, metrics)), stats), None

    first = jax.tree.map(lambda x: x[0], parts)
    gradient, _, metrics = jax.eval_shape(part, stats, first)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (gradient, metrics))
    ((gradient, metrics), stats), _ = lax.scan(body, (zero, stats), parts)
    return gradient, stats, metrics


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    settings: Settings,
    mesh: Mesh,
    *,
    batch_size: int,
    rows: int,
    many: bool = False,
    streamed: bool = False,
) -> jax.stages.Wrapped:
    """The compiled step over the mesh: `step(state, data, order, first, selection, key, count)`.

    Args of the result:
      state: a TicketState, replicated; it is donated.
      data: the training `Images`, replicated. order: the epoch's order, int32 [n].
      first: where in the order the first batch begins, int32.
      selection: see `make_update`.
      key: key data, uint32 [2]; noise and augmentation fold in the step and each example's id.
      count: how many steps to run, int32, each on the batch after; 1 unless `many`.

    Args:
      batch_size: the place of a batch in the order is a multiple of this.
      rows: examples of this batch: batch_size, or fewer for the last, short one. Divisible by the devices.
      many: loop over `count` steps in one dispatch.
      streamed: `data` is this step's batch alone, split over the mesh by rows; order and first are not used.

    Raises:
      ValueError: the devices, or the parts of a device's batch, cannot share it evenly.
    """
    per_device = _per_device(rows, mesh.size, settings.accumulate)
    update = make_update(model, optimizer, settings, AXIS, cast=on_gpu(mesh) and settings.accumulate == 1)
    batch_of = _make_batch(settings, per_device, streamed)

    def steps(
        state: TicketState,
        data: Images,
        order: jax.Array,
        first: jax.Array,
        selection: PyTree,
        key: jax.Array,
        count: jax.Array,
    ) -> tuple[TicketState, dict[str, jax.Array]]:
        key = jax.random.wrap_key_data(key)

        def one(state: TicketState, first: jax.Array) -> tuple[TicketState, dict[str, jax.Array]]:
            return update(state, *batch_of(state, data, order, first, key), selection)

        def body(i: jax.Array, carry: tuple) -> tuple:
            state, metrics = one(carry[0], first + i * batch_size)
            return state, jax.tree.map(jnp.add, carry[1], metrics)

        if not many:
            return one(state, first)
        zero = {name: jnp.zeros((), jnp.float32) for name in ("loss", "correct", "count")}
        return lax.fori_loop(0, count, body, (state, zero))

    specs = (PartitionSpec(), PartitionSpec(AXIS) if streamed else PartitionSpec(), *[PartitionSpec()] * 5)
    mapped = jax.shard_map(steps, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
    return jax.jit(mapped, donate_argnums=0)


def _per_device(rows: int, devices: int, accumulate: int) -> int:
    """Images of a batch on each device, checked."""
    each = rows // devices
    if each * devices != rows or not rows:
        raise ValueError(f"a batch of {rows} images cannot be split over {devices} devices; take a multiple.")
    if each % accumulate:
        raise ValueError(f"{each} images a device cannot be accumulated in {accumulate} equal parts.")
    return each


def _make_batch(
    settings: Settings, per_device: int, streamed: bool
) -> Callable[..., tuple[jax.Array, jax.Array, jax.Array | None]]:
    """A device's part of a batch, augmented: `batch(state, data, order, first, key) -> (images, labels, noise)`."""

    @jax.named_scope("data")
    def batch(state: TicketState, data: Images, order: jax.Array, first: jax.Array, key: jax.Array) -> _Batch:
        place = jnp.arange(per_device, dtype=jnp.int32)
        if not streamed:
            place = order[first + lax.axis_index(AXIS) * per_device + place]
        dtype = jax.tree.leaves(state.params)[0].dtype
        images, labels, ids = data.take(place, dtype)
        keys = example_keys(jax.random.fold_in(key, state.step), ids)
        crop_keys, noise_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
        images = augment(crop_keys, images, settings.crop_padding, settings.flip)
        noise = settings.threat.noise(noise_keys, images) if settings.attack.random_start else None
        return images, labels, noise

    return batch
