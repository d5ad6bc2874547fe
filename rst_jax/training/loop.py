"""The only training loop: steps, logs, held-out evaluation, checkpoints, exact resume."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import PyTree

from rst_jax.config import Config, Optimizer, PGDSettings
from rst_jax.data.feed import Feed
from rst_jax.runtime import preemption
from rst_jax.runtime.mesh import on_cpu, replicate
from rst_jax.runtime.progress import Progress, Say
from rst_jax.training.checkpoint import RunCheckpoints
from rst_jax.training.metrics import MetricsWriter, means
from rst_jax.training.optimizer import make_optimizer, make_schedule
from rst_jax.training.state import TicketState
from rst_jax.training.step import Settings, make_train_step
from rst_jax.training.target import Target


@dataclasses.dataclass(frozen=True)
class Job:
    """One network to train: its name in the workdir, what is trained, how long and at which rates."""

    name: str
    target: Target
    epochs: int
    optimizer: Optimizer


@dataclasses.dataclass(frozen=True)
class Best:
    """The best state of a job: where it was and its accuracy on the images that chose it."""

    state: TicketState
    epoch: int
    natural: float
    robust: float


def make_job_step(
    config: Config,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    job: Job,
    mesh: Mesh,
    rows: int,
    attack: PGDSettings,
    many: bool,
    streamed: bool,
) -> jax.stages.Wrapped:
    """`make_train_step` as the configuration has it, for batches of `rows` images."""
    c, per_device = config, rows // mesh.size
    largest = max(c.batch_size // mesh.size // c.accumulate, 1)  # images of a part
    settings = Settings(
        target=job.target,
        threat=c.threat,
        attack=attack,
        batch_norm=c.attack.batch_norm,
        label_smoothing=c.label_smoothing,
        crop_padding=c.crop_padding,
        flip=c.flip,
        accumulate=next(k for k in range(1, per_device + 1) if per_device % k == 0 and per_device // k <= largest),
        unroll=c.unroll == "unroll" or (c.unroll == "auto" and on_cpu(mesh)),
    )
    return make_train_step(
        model, optimizer, settings, mesh, batch_size=c.batch_size, rows=rows, many=many, streamed=streamed
    )


class Trainer:
    """Trains networks of one shape on one dataset; jobs that differ only in their state share compiled steps.

    Args:
      config: the run's.
      model: a Flax module.
      feed: the training images, on all devices; its key "step" is the step's.
      workdir: holds checkpoints/ and metrics.
    """

    def __init__(self, config: Config, model: nn.Module, feed: Feed, workdir: Path, writer: MetricsWriter, say: Say):
        self.config, self.model, self.feed, self.mesh = config, model, feed, feed.mesh
        self.workdir, self.writer, self.say = workdir, writer, say
        if left := feed.left_out:
            n, devices = len(feed.split), feed.mesh.size
            say(f"{left} of {n} training images an epoch are left out: {devices} devices cannot share them evenly")
        self._steps: dict[Hashable, Callable] = {}

    def optimizer_of(self, job: Job) -> tuple[optax.GradientTransformation, optax.Schedule]:
        """The job's optax transformation and its schedule."""
        schedule = make_schedule(job.optimizer, job.epochs, len(self.feed.batches))
        return make_optimizer(job.optimizer, schedule), schedule

    def begin(self, job: Job, variables: dict[str, PyTree]) -> TicketState:
        """A state at step 0, on the mesh; the step may take its buffers, so they are copies."""
        optimizer, _ = self.optimizer_of(job)
        variables = jax.tree.map(jnp.copy, variables)
        state = TicketState(
            step=jnp.zeros((), jnp.int32),
            params=variables["params"],
            scores=variables["scores"],
            batch_stats=variables["batch_stats"],
            opt_state=optimizer.init(variables[job.target.collection]),
        )
        return replicate(state, self.mesh)

    def step(self, job: Job, rows: int, attack: PGDSettings) -> Callable:
        """The compiled step for batches of `rows` images; the same object for jobs that differ in name alone."""
        key = (job.target, job.epochs, job.optimizer, len(self.feed.batches), rows, attack)
        if key not in self._steps:
            many = self.feed.steps_per_dispatch > 1 and rows == self.config.batch_size
            optimizer, _ = self.optimizer_of(job)
            self._steps[key] = make_job_step(
                self.config, self.model, optimizer, job, self.mesh, rows, attack, many, self.feed.streamed
            )
        return self._steps[key]

    def run(
        self,
        job: Job,
        variables: dict[str, PyTree],
        selection: PyTree,
        validate: Callable[[TicketState], tuple[float, float]],
    ) -> Best:
        """Train from step 0 or from the job's last checkpoint, and return its best state.

        Args:
          job: what to train.
          variables: params, scores and batch_stats to start from.
          selection: kept counts or fixed masks; see `rst_jax.training.step.make_update`.
          validate: natural and robust accuracy of a state on the images that choose the best.

        Raises:
          FloatingPointError: the loss or what is trained is not finite; the step and the first such layer are named.
          Preempted: the process was asked to stop; the state is saved.
          ValueError: a checkpoint is there and cannot be read.
        """
        checkpoints = RunCheckpoints(self.workdir / "checkpoints" / job.name, self.say)
        at = self._place(job, variables, checkpoints)
        per_epoch = len(self.feed.batches)
        total = job.epochs * per_epoch
        if at.step:
            self.say(f"{job.name}: going on after epoch {at.step / per_epoch:.4g} of {job.epochs}")
        self.writer.begin(job.name, at.step)
        selection, schedule = replicate(selection, self.mesh), self.optimizer_of(job)[1]
        with contextlib.ExitStack() as stack:
            stack.callback(checkpoints.close)
            stack.callback(self.writer.close)
            bar = stack.enter_context(Progress(total, at.step, job.name, "steps", self.say))
            for d in stack.enter_context(contextlib.closing(self.feed.dispatches(at.step, total))):
                compiled = self.step(job, d.rows, self.config.attack.pgd(at.step // per_epoch))
                where = (d.data, d.order, np.int32(d.first), selection, self.feed.keys["step"], np.int32(d.steps))
                at.state, metrics = compiled(at.state, *where)
                at.pending.append(metrics)
                at.step += d.steps
                bar.update(d.steps, lambda: self._about(job, at))
                ends_epoch = at.step % per_epoch == 0
                if ends_epoch or at.step % self.config.log_every_steps == 0:
                    self._log(job, at, float(schedule(at.step - 1)))
                if ends_epoch:
                    self._end_epoch(job, at, checkpoints, validate)
                    bar.milestone(self._about(job, at))
                if at.step < total and preemption.asked():
                    self._save(at, checkpoints)
                    raise preemption.Preempted
            best = checkpoints.restore_best(at.state, at.kept["best_step"])
        return Best(best, at.kept["best_epoch"], at.kept["best_natural"], at.kept["best_robust"])

    def _place(self, job: Job, variables: dict[str, PyTree], checkpoints: RunCheckpoints) -> "_Place":
        """The job's last checkpoint, or its beginning."""
        state = self.begin(job, variables)
        kept: dict[str, Any] = {"best_step": -1, "best_epoch": 0, "best_natural": 0.0, "best_robust": -1.0}
        kept |= {"tail": self.feed.tail, "pending": []}
        if restored := checkpoints.restore_latest(state):
            state, kept = restored
            self.feed.keep_tail(kept["tail"])
        return _Place(state, int(state.step), kept, kept["pending"])

    def _save(self, at: "_Place", checkpoints: RunCheckpoints) -> None:
        self.writer.flush()  # what the checkpoint does not run again must lie on the disk
        checkpoints.save_latest(at.state, at.kept | {"pending": [_total(at.pending)] if at.pending else []})

    def _end_epoch(
        self,
        job: Job,
        at: "_Place",
        checkpoints: RunCheckpoints,
        validate: Callable[[TicketState], tuple[float, float]],
    ) -> None:
        """Validate and save as often as the configuration says; always at the end."""
        c, improved, done = self.config, False, at.step // len(self.feed.batches)
        last = done == job.epochs
        if last or done % c.evaluate.every_epochs == 0:
            natural, robust = validate(at.state)
            self.writer.write(job.name, at.step, {"epoch": done, "natural": natural, "robust": robust})
            improved = robust > at.kept["best_robust"]
            if improved:
                at.kept.update(best_step=at.step, best_epoch=done, best_natural=natural, best_robust=robust)
                checkpoints.save_best(at.state)
        if last or improved or done % c.checkpoint_every_epochs == 0:
            self._save(at, checkpoints)

    def _log(self, job: Job, at: "_Place", rate: float) -> None:
        """Fetch the metrics since the last call, the only host synchronisation; stop at what is not finite."""
        row = means(_total(at.pending))
        if not (math.isfinite(row["loss"]) and bool(_finite(job.target.trained(at.state)))):
            raise FloatingPointError(_diagnose(job.name, at.step, row["loss"], at.state))
        self.writer.write(job.name, at.step, {**row, "learning_rate": rate})
        at.pending, at.row = [], row

    def _about(self, job: Job, at: "_Place") -> str:
        """For a person: how far it is, and what was seen since the last log, or in it."""
        row = means(_total(at.pending)) if at.pending else at.row
        return (
            f"epoch {at.step / len(self.feed.batches):.4g} of {job.epochs}, loss {row['loss']:.3f}, "
            f"{100 * row['adversarial_accuracy']:.1f} % under attack"
        )


@dataclasses.dataclass
class _Place:
    """Where a job is: what its checkpoint holds.

    Attributes:
      state: after `step` steps.
      kept: plain values: the best so far, the shape of an epoch.
      pending: metrics that are not yet logged. row: those last logged.
    """

    state: TicketState
    step: int
    kept: dict[str, Any]
    pending: list[dict[str, jax.Array]]
    row: dict[str, float] = dataclasses.field(default_factory=dict)


def _total(pending: list[dict[str, jax.Array]]) -> dict[str, float]:
    """The sums of summed metrics, on the host."""
    fetched = jax.device_get(pending)
    return {name: sum(float(m[name]) for m in fetched) for name in fetched[0]}


@jax.jit
def _finite(tree: PyTree) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def _diagnose(name: str, step: int, loss: float, state: TicketState) -> str:
    leaves = jax.tree_util.tree_leaves_with_path({"scores": state.scores, "params": state.params})
    broken = [jax.tree_util.keystr(path) for path, leaf in leaves if not bool(jnp.all(jnp.isfinite(leaf)))]
    where = f"{broken[0]} and {len(broken) - 1} more layers are not finite" if broken else "the weights are finite"
    return f"{name}: the loss is {loss} when looked at in step {step}; {where}. Try a smaller learning_rate."
