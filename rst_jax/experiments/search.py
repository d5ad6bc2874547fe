"""Drawing tickets: a mask searched at every remaining ratio, and the dense network to compare with."""

import dataclasses
import functools
import time
from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import PyTree

from rst_jax import subnet
from rst_jax.experiments.run import DENSE, Run, name_of
from rst_jax.tickets.store import save_tickets
from rst_jax.tickets.ticket import Kind, Origin, Ticket
from rst_jax.training.loop import Job
from rst_jax.training.state import TicketState
from rst_jax.training.target import Scores, Target, Weights


def search(run: Run) -> None:
    """Draw a ticket at each ratio; write its file, and the checkpoint of all of them.

    What is finished in the workdir is not done again; what was interrupted goes on.
    """
    c = run.config
    for ratio in sorted(c.remaining_ratios):
        kept = subnet.kept_counts(run.variables["scores"], ratio)
        job = Job(name_of(ratio), Scores(), c.epochs, c.optimizer)
        _draw(run, job, run.variables, kept, "scratch", ratio)
    drawn = run.store.scratch()
    if run.store.in_checkpoint() != {ticket.name: ticket.digest for ticket in drawn}:
        save_tickets(run.store.checkpoint, run.variables["params"], drawn)


def dense(run: Run) -> None:
    """Train the dense network of the same shape, if the configuration asks for it."""
    c = run.config
    if not c.dense.train:
        return
    optimizer = dataclasses.replace(c.optimizer, learning_rate=c.dense.learning_rate, weight_decay=c.dense.weight_decay)
    job = Job(DENSE, Weights(), c.dense.epochs, optimizer)
    _draw(run, job, {**run.variables, "scores": {}}, {}, "dense", 1.0)


def _draw(run: Run, job: Job, variables: dict[str, PyTree], selection: PyTree, kind: Kind, ratio: float) -> None:
    if job.name in run.store:
        ticket = run.store.load(job.name)
        if (ticket.kind, ticket.remaining_ratio) != (kind, ratio):
            raise ValueError(
                f"{run.store.path(job.name)}: it is {ticket.kind} of ratio {ticket.remaining_ratio}, not {kind} of "
                f"{ratio}; take a new --workdir."
            )
        run.say(f"{job.name}: already drawn")
        return
    masks_of = _masks_of(job.target)
    start = time.monotonic()
    best = run.trainer.run(job, variables, selection, _validation(run, job, masks_of, selection))
    c, masks = run.config, jax.tree.map(np.asarray, masks_of(best.state, selection))
    origin = Origin(
        name=job.name,
        dataset=c.dataset,
        seed=c.seed,
        pattern=c.pattern,
        weight_init=c.weight_init,
        epoch=best.epoch,
        selected_on=c.select_on,
        selection_natural=best.natural,
        selection_robust=best.robust,
    )
    state = best.state
    ticket = Ticket.make(run.model, run.image_shape, ratio, state.params, masks, state.batch_stats, kind, origin)
    run.store.save(ticket)
    kept, total = ticket.weight_counts
    run.say(
        f"{job.name}: {kept:,} of {total:,} weights, {100 * best.natural:.1f} % natural, {100 * best.robust:.1f} % "
        f"{run.evaluator.attack_record.name} on {c.select_on} at epoch {best.epoch}, "
        f"{time.monotonic() - start:.1f} s"
    )


_masked = jax.jit(subnet.apply_masks)


@functools.cache
def _masks_of(target: Target) -> Callable[[TicketState, PyTree], PyTree]:
    """The masks of a state as a program, which all jobs of a target share."""
    return jax.jit(target.masks)


def _validation(
    run: Run, job: Job, masks_of: Callable[[TicketState, PyTree], PyTree], selection: PyTree
) -> Callable[[TicketState], tuple[float, float]]:
    """Natural and robust accuracy of a state on the images that choose the best one."""
    split = run.dataset.holdout if run.config.select_on == "holdout" else run.dataset.test

    def validate(state: TicketState) -> tuple[float, float]:
        variables = {"params": _masked(state.params, masks_of(state, selection)), "batch_stats": state.batch_stats}
        return run.evaluator.accuracies(variables, split)

    return validate
