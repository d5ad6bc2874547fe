"""The only training loop: steps, logs, held-out evaluation, checkpoints, exact resume."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rst_jax.config import Config, Optimizer, PGDSettings
from rst_jax.data.pipeline import Images, epoch_order
from rst_jax.data.sources import Split
from rst_jax.data.stream import EncodedImages, prefetched
from rst_jax.runtime import preemption
from rst_jax.runtime.mesh import make_rows, on_cpu, replicate
from rst_jax.runtime.progress import Say, progress
from rst_jax.training.checkpoint import RunCheckpoints
from rst_jax.training.metrics import MetricsWriter, means
from rst_jax.training.optimizer import make_optimizer, make_schedule
from rst_jax.training.state import TicketState
from rst_jax.training.step import Settings, make_train_step
from rst_jax.training.target import Target

Tree = Any
_STEPS_A_DISPATCH = 64


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


def batch_sizes(n: int, batch_size: int, devices: int, tail: int | None = None) -> list[int]:
    """The batches of an epoch of n images: whole ones, then a short one of what the devices can share evenly.

    Args:
      tail: the size of the short batch where a run began on other devices; its epochs stay as they were.

    Raises:
      ValueError: the devices cannot share a batch, or there is none.
    """
    if batch_size % devices:
        raise ValueError(f"config: batch_size must be a multiple of the {devices} devices; got {batch_size}.")
    if tail is None:
        tail = n % batch_size // devices * devices
    if tail % devices:
        raise ValueError(
            f"the last batch of an epoch of this run has {tail} images, which {devices} devices cannot share; go on "
            "with a number of devices that divides it, or take a new --workdir."
        )
    if not n // batch_size and not tail:
        raise ValueError(f"config: {n} training images do not make a batch on {devices} devices.")
    return [batch_size] * (n // batch_size) + ([tail] if tail else [])


class Dispatch(NamedTuple):
    """What one call of the step gets: `steps` batches of `rows` images, from `data` at order[first:]."""

    steps: int
    rows: int
    data: Images
    order: jax.Array | np.ndarray
    first: int


def make_job_step(
    config: Config,
    model: nn.Module,
    optimizer: Any,
    job: Job,
    mesh: Mesh,
    rows: int,
    attack: PGDSettings,
    many: bool,
    streamed: bool,
) -> Any:
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
      mesh: all devices.
      train: the training images: kept on the device, or decoded batch by batch where they are encoded files.
      levels: the integer that means 1.0.
      keys: key data, uint32 [2] each: "order" and "step".
      workdir: holds checkpoints/ and metrics.
    """

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        mesh: Mesh,
        train: Split,
        levels: int,
        keys: dict[str, np.ndarray],
        workdir: Path,
        writer: MetricsWriter,
        say: Say,
    ):
        self.config, self.model, self.mesh, self.train, self.levels = config, model, mesh, train, levels
        self.keys, self.workdir, self.writer, self.say = keys, workdir, writer, say
        self.streamed = isinstance(train.images, EncodedImages)
        n = len(train)
        self.batches = batch_sizes(n, config.batch_size, mesh.size)
        if left := n - sum(self.batches):
            say(f"{left} of {n} training images an epoch are left out: {mesh.size} devices cannot share them evenly")
        self.whole = n // config.batch_size
        self.dispatch = config.steps_per_dispatch or (1 if on_cpu(mesh) else _STEPS_A_DISPATCH)
        if self.streamed:
            self.dispatch = 1
        else:
            self.data = replicate(Images(train.images, train.labels, train.ids, levels), mesh)  # type: ignore[arg-type]
        self._steps: dict[Any, Callable] = {}
        self._order = jax.jit(
            lambda key, epoch: epoch_order(jax.random.wrap_key_data(key), epoch, n),
            # Batches are decoded in another thread, whose programs must not come between those over the mesh.
            out_shardings=None if self.streamed else NamedSharding(mesh, PartitionSpec()),
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
            opt_state=optimizer.init(variables[job.target.collection]),
        )
        return replicate(state, self.mesh)

    def step(self, job: Job, rows: int, attack: PGDSettings) -> Callable:
        """The compiled step for batches of `rows` images; the same object for jobs that differ in name alone."""
        key = (job.target, job.epochs, job.optimizer, len(self.batches), rows, attack)
        if key not in self._steps:
            many = self.dispatch > 1 and rows == self.config.batch_size
            optimizer, _ = self.optimizer_of(job)
            self._steps[key] = make_job_step(
                self.config, self.model, optimizer, job, self.mesh, rows, attack, many, self.streamed
            )
        return self._steps[key]

    def dispatches(self, step: int, total: int) -> Iterator[Dispatch]:
        """The batches from `step` to `total`, in order; none crosses the end of an epoch or a log."""
        c, order_of = self.config, -1
        while step < total:
            epoch, place = divmod(step, len(self.batches))
            if order_of != epoch:
                order, order_of = self._order(self.keys["order"], np.int32(epoch)), epoch
            rows, first = self.batches[place], place * c.batch_size
            until_log = c.log_every_steps - step % c.log_every_steps
            count = max(1, min(self.dispatch, self.whole - place, until_log))
            if self.streamed:
                data = self._decoded(np.asarray(order)[first : first + rows], epoch)
                yield Dispatch(1, rows, data, np.zeros(0, np.int32), 0)
            else:
                yield Dispatch(count, rows, self.data, order, first)
            step += count

    def _decoded(self, index: np.ndarray, epoch: int) -> Images:
        """A batch of encoded images, cropped at random; each process decodes the rows of its own devices."""

        encoded, n = self.train.images, len(index)
        assert isinstance(encoded, EncodedImages)

        def crops(rows: slice) -> np.ndarray:
            return encoded.crops(index[rows], self.keys["step"], epoch)

        return Images(
            make_rows((n, *self.train.images.shape[1:]), crops, self.mesh),
            make_rows((n,), lambda rows: self.train.labels[index[rows]], self.mesh),
            make_rows((n,), lambda rows: self.train.ids[index[rows]], self.mesh),
            self.levels,
        )

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
          selection: kept counts or fixed masks; see `rst_jax.training.step.make_update`.
          validate: natural and robust accuracy of a state on the images that choose the best.

        Raises:
          FloatingPointError: the loss or what is trained is not finite; the step and the first such layer are named.
          Preempted: the process was asked to stop; the state is saved.
          ValueError: a checkpoint is there and cannot be read.
        """
        c = self.config
        checkpoints = RunCheckpoints(self.workdir / "checkpoints" / job.name)
        state = self.begin(job, variables)
        # What a checkpoint holds beside the state: the best so far, the shape of an epoch, metrics not yet logged.
        kept: dict[str, Any] = {"best_step": -1, "best_epoch": 0, "best_natural": 0.0, "best_robust": -1.0}
        kept |= {"tail": self.batches[-1] % c.batch_size, "pending": []}
        if restored := checkpoints.restore_latest(state):
            state, kept = restored
            self.batches = batch_sizes(len(self.train), c.batch_size, self.mesh.size, kept["tail"])
        per_epoch, step = len(self.batches), int(state.step)
        total = job.epochs * per_epoch
        if step:
            self.say(f"{job.name}: going on after epoch {step / per_epoch:.4g} of {job.epochs}")
        if step < total:
            self.writer.begin(job.name, step)
        selection, schedule = replicate(selection, self.mesh), self.optimizer_of(job)[1]
        pending: list[dict[str, Any]] = kept["pending"]

        def save() -> None:
            checkpoints.save_latest(state, kept | {"pending": [_total(pending)] if pending else []})
            self.writer.flush()

        def end_epoch() -> None:
            last, done = step == total, step // per_epoch
            improved = False
            if last or done % c.evaluate.every_epochs == 0:
                natural, robust = validate(state)
                self.writer.write(job.name, step, {"epoch": done, "natural": natural, "robust": robust})
                improved = robust > kept["best_robust"]
                if improved:
                    kept.update(best_step=step, best_epoch=done, best_natural=natural, best_robust=robust)
                    checkpoints.save_best(state)
            if last or improved or done % c.checkpoint_every_epochs == 0:
                save()

        with contextlib.ExitStack() as stack:
            stack.callback(checkpoints.close)
            stack.callback(self.writer.close)
            bar = stack.enter_context(progress(total, step, job.name, "step"))
            dispatches = self.dispatches(step, total)
            if self.streamed:
                dispatches = stack.enter_context(contextlib.closing(prefetched(dispatches, 2)))
            for d in dispatches:
                compiled = self.step(job, d.rows, c.attack.pgd(step // per_epoch))
                where = (d.data, d.order, np.int32(d.first))
                state, metrics = compiled(state, *where, selection, self.keys["step"], np.int32(d.steps))
                pending.append(metrics)
                step += d.steps
                bar.update(d.steps)
                ends_epoch = step % per_epoch == 0
                if ends_epoch or step % c.log_every_steps == 0:
                    self._log(job, state, step, pending, float(schedule(step - 1)))
                    pending = []
                if ends_epoch:
                    end_epoch()
                if step < total and preemption.asked():
                    save()
                    raise preemption.Preempted
            best = checkpoints.restore_best(state, kept["best_step"])
        return Best(best, kept["best_epoch"], kept["best_natural"], kept["best_robust"])

    def _log(self, job: Job, state: TicketState, step: int, pending: list, rate: float) -> None:
        """Fetch the metrics since the last call, the only host synchronisation; stop at what is not finite."""
        row = means(_total(pending))
        if not (math.isfinite(row["loss"]) and bool(_finite(job.target.trained(state)))):
            raise FloatingPointError(_diagnose(job.name, step, row["loss"], state))
        self.writer.write(job.name, step, {**row, "learning_rate": rate})


def _total(pending: list[dict[str, Any]]) -> dict[str, float]:
    """The sums of summed metrics, on the host."""
    fetched = jax.device_get(pending)
    return {name: sum(float(m[name]) for m in fetched) for name in fetched[0]}


@jax.jit
def _finite(tree: Tree) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def _diagnose(name: str, step: int, loss: float, state: TicketState) -> str:
    leaves = jax.tree_util.tree_leaves_with_path({"scores": state.scores, "params": state.params})
    broken = [jax.tree_util.keystr(path) for path, leaf in leaves if not bool(jnp.all(jnp.isfinite(leaf)))]
    where = f"{broken[0]} and {len(broken) - 1} more layers are not finite" if broken else "the weights are finite"
    return f"{name}: the loss is {loss} when looked at in step {step}; {where}. Try a smaller learning_rate."
