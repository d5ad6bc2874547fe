"""The only training loop: steps, logs, held-out evaluation, checkpoints, exact resume."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rst_jax.checkpoint import RunCheckpoints
from rst_jax.config import Config, Optimizer
from rst_jax.data.pipeline import Images, epoch_order
from rst_jax.mesh import on_cpu, replicate
from rst_jax.metrics import MetricsWriter, Say, means, progress
from rst_jax.state import TicketState, make_optimizer, make_schedule
from rst_jax.step import Settings, Trainable, make_train_step
from rst_jax.threat import ThreatModel

Tree = Any
_STEPS_A_DISPATCH = 64


@dataclasses.dataclass(frozen=True)
class Job:
    """One network to train: its name in the workdir, what is trained, how long and at which rates."""

    name: str
    trainable: Trainable
    epochs: int
    optimizer: Optimizer


@dataclasses.dataclass(frozen=True)
class Best:
    """The best state of a job: where it was and its accuracy on the images that chose it."""

    state: TicketState
    epoch: int
    natural: float
    robust: float


def batch_sizes(n: int, batch_size: int, devices: int) -> list[int]:
    """The batches of an epoch of n images: whole ones, then a short one of what the devices can share evenly.

    Raises:
      ValueError: the devices cannot share a batch, or there is none.
    """
    if batch_size % devices:
        raise ValueError(f"config: batch_size must be a multiple of the {devices} devices; got {batch_size}.")
    tail = n % batch_size // devices * devices
    if not n // batch_size and not tail:
        raise ValueError(f"config: {n} training images do not make a batch on {devices} devices.")
    return [batch_size] * (n // batch_size) + ([tail] if tail else [])


class Trainer:
    """Trains networks of one shape on one dataset; jobs that differ only in their state share compiled steps.

    Args:
      config: the run's.
      model: a Flax module.
      mesh: all devices.
      data: the training images, on the device.
      keys: key data, uint32 [2] each: "order" and "step".
      workdir: holds checkpoints/ and metrics.
    """

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        mesh: Mesh,
        data: Images,
        keys: dict[str, np.ndarray],
        workdir: Path,
        writer: MetricsWriter,
        say: Say,
    ):
        self.config, self.model, self.mesh, self.data, self.keys = config, model, mesh, data, keys
        self.workdir, self.writer, self.say = workdir, writer, say
        n = len(data.labels)
        self.batches = batch_sizes(n, config.batch_size, mesh.size)
        if left := n - sum(self.batches):
            say(f"{left} of {n} training images an epoch are left out: {mesh.size} devices cannot share them evenly")
        self.whole = n // config.batch_size
        self.dispatch = config.steps_per_dispatch or (1 if on_cpu(mesh) else _STEPS_A_DISPATCH)
        self._steps: dict[Any, Callable] = {}
        self._order = jax.jit(
            lambda key, epoch: epoch_order(jax.random.wrap_key_data(key), epoch, n),
            out_shardings=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()),
        )

    def optimizer_of(self, job: Job) -> tuple[Any, Any]:
        """The job's optax transformation and its schedule."""
        schedule = make_schedule(job.optimizer, job.epochs, len(self.batches))
        return make_optimizer(job.optimizer, schedule), schedule

    def begin(self, job: Job, variables: dict[str, Tree]) -> TicketState:
        """A state at step 0, on the mesh; the step may take its buffers, so they are copies."""
        optimizer, _ = self.optimizer_of(job)
        variables = jax.tree.map(jnp.copy, variables)
        state = TicketState(
            step=jnp.zeros((), jnp.int32),
            params=variables["params"],
            scores=variables["scores"],
            batch_stats=variables["batch_stats"],
            opt_state=optimizer.init(variables[job.trainable]),
        )
        return replicate(state, self.mesh)

    def step(self, job: Job, rows: int) -> Callable:
        """The compiled step for batches of `rows` images; the same object for jobs that differ in name alone."""
        c = self.config
        key = (job.trainable, job.epochs, job.optimizer, rows)
        if key not in self._steps:
            settings = Settings(
                trainable=job.trainable,
                threat=ThreatModel(c.threat.eps, c.threat.norm),
                attack_steps=c.attack.steps,
                attack_step_size=c.attack.step_size,
                random_start=c.attack.random_start,
                attack_batch_norm=c.attack.batch_norm,
                label_smoothing=c.label_smoothing,
                crop_padding=c.crop_padding,
                flip=c.flip,
                unroll=c.unroll == "unroll" or (c.unroll == "auto" and on_cpu(self.mesh)),
            )
            self._steps[key] = make_train_step(
                self.model,
                self.optimizer_of(job)[0],
                settings,
                self.mesh,
                batch_size=c.batch_size,
                rows=rows,
                many=self.dispatch > 1 and rows == c.batch_size,
            )
        return self._steps[key]

    def run(
        self,
        job: Job,
        variables: dict[str, Tree],
        selection: Tree,
        validate: Callable[[TicketState], tuple[float, float]],
    ) -> Best:
        """Train from step 0 or from the job's last checkpoint, and return its best state.

        Args:
          job: what to train.
          variables: params, scores and batch_stats to start from.
          selection: kept counts or fixed masks; see `rst_jax.step.make_update`.
          validate: natural and robust accuracy of a state on the images that choose the best.

        Raises:
          FloatingPointError: the loss or what is trained is not finite; the step and the first such layer are named.
          ValueError: a checkpoint is there and cannot be read.
        """
        c, per_epoch = self.config, len(self.batches)
        total = job.epochs * per_epoch
        checkpoints = RunCheckpoints(self.workdir / "checkpoints" / job.name)
        state = self.begin(job, variables)
        kept: dict[str, Any] = {"best_step": -1, "best_epoch": 0, "best_natural": 0.0, "best_robust": -1.0}
        kept["per_epoch"] = per_epoch
        if restored := checkpoints.restore_latest(state):
            state, kept = restored
            if kept["per_epoch"] != per_epoch:
                raise ValueError(
                    f"{job.name}: its checkpoint counts {kept['per_epoch']} steps an epoch, these {self.mesh.size} "
                    f"devices make {per_epoch}. Go on with as many devices as before, or take a new --workdir."
                )
        step = int(state.step)
        if step:
            self.say(f"{job.name}: going on after epoch {step / per_epoch:.4g} of {job.epochs}")
        if step < total:
            self.writer.begin(job.name, step)
        selection, schedule = replicate(selection, self.mesh), self.optimizer_of(job)[1]
        order_of = -1
        pending: list[dict[str, jax.Array]] = []
        with progress(total, step, job.name, "step") as bar:
            while step < total:
                epoch, place = divmod(step, per_epoch)
                if order_of != epoch:
                    order, order_of = self._order(self.keys["order"], np.int32(epoch)), epoch
                rows = self.batches[place]
                until_log = c.log_every_steps - step % c.log_every_steps
                count = max(1, min(self.dispatch, self.whole - place, until_log))
                state, metrics = self.step(job, rows)(
                    state,
                    self.data,
                    order,
                    np.int32(place * c.batch_size),
                    selection,
                    self.keys["step"],
                    np.int32(count),
                )
                pending.append(metrics)
                step += count
                bar.update(count)
                ends_epoch = step % per_epoch == 0
                if ends_epoch or step % c.log_every_steps == 0:
                    self._log(job, state, step, pending, float(schedule(step - 1)))
                    pending = []
                if not ends_epoch:
                    continue
                last, done = step == total, step // per_epoch
                improved = False
                if last or done % c.evaluate.every_epochs == 0:
                    natural, robust = validate(state)
                    self.writer.write(job.name, step, {"epoch": done, "natural": natural, "robust": robust})
                    improved = robust > kept["best_robust"]
                    if improved:
                        kept |= {"best_step": step, "best_epoch": done, "best_natural": natural, "best_robust": robust}
                        checkpoints.save_best(state)
                if last or improved or done % c.checkpoint_every_epochs == 0:
                    checkpoints.save_latest(state, kept)
                    self.writer.flush()
        self.writer.close()
        best = checkpoints.restore_best(state, kept["best_step"])
        checkpoints.close()
        return Best(best, kept["best_epoch"], kept["best_natural"], kept["best_robust"])

    def _log(self, job: Job, state: TicketState, step: int, pending: list, rate: float) -> None:
        """Fetch the metrics since the last call, the only host synchronisation; stop at what is not finite."""
        fetched = jax.device_get(pending)
        row = means({name: sum(float(m[name]) for m in fetched) for name in fetched[0]})
        if not (math.isfinite(row["loss"]) and bool(_finite(getattr(state, job.trainable)))):
            raise FloatingPointError(_diagnose(job.name, step, row["loss"], state))
        self.writer.write(job.name, step, {**row, "learning_rate": rate})


@jax.jit
def _finite(tree: Tree) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def _diagnose(name: str, step: int, loss: float, state: TicketState) -> str:
    leaves = jax.tree_util.tree_leaves_with_path({"scores": state.scores, "params": state.params})
    broken = [jax.tree_util.keystr(path) for path, leaf in leaves if not bool(jnp.all(jnp.isfinite(leaf)))]
    where = f"{broken[0]} and {len(broken) - 1} more layers are not finite" if broken else "the weights are finite"
    return f"{name}: the loss is {loss} when looked at in step {step}; {where}. Try a smaller learning_rate."
