"""Drawing tickets: a mask searched at every remaining ratio, and the dense network to compare with."""

import dataclasses
import time

import jax
import numpy as np

from rst_jax import subnet
from rst_jax.experiments.run import Run, Tree, name_of
from rst_jax.runtime.mesh import from_main
from rst_jax.tickets.r2s import save_r2s
from rst_jax.tickets.ticket import Ticket, load_ticket
from rst_jax.training.loop import Best, Job
from rst_jax.training.state import TicketState


def search(run: Run) -> list[Ticket]:
    """Draw a ticket at each ratio (and train the dense network), write their files and the checkpoint for R2S.

    What is finished in the workdir is not done again; what was interrupted goes on.
    """
    c = run.config
    tickets = []
    for ratio in sorted(c.remaining_ratios):
        kept = subnet.kept_counts(run.variables["scores"], ratio)
        job = Job(name_of(ratio), "scores", c.epochs, c.optimizer)
        tickets.append(_draw(run, job, run.variables, kept, ratio))
    known = [load_ticket(path) for path in sorted(run.ticket_path("x").parent.glob("ratio-*.ticket"))]
    save_r2s(run.workdir / "checkpoints" / "tickets", run.variables["params"], known)
    if c.dense.train:
        optimizer = dataclasses.replace(
            c.optimizer, learning_rate=c.dense.learning_rate, weight_decay=c.dense.weight_decay
        )
        job = Job("dense", "params", c.dense.epochs, optimizer)
        tickets.append(_draw(run, job, {**run.variables, "scores": {}}, {}, 1.0))
    return tickets


def _draw(run: Run, job: Job, variables: dict[str, Tree], selection: Tree, ratio: float) -> Ticket:
    path = run.ticket_path(job.name)
    if from_main(np.asarray(path.exists())):
        ticket = load_ticket(path)
        if ticket.remaining_ratio != ratio:
            raise ValueError(f"{path}: it has ratio {ticket.remaining_ratio}, not {ratio}; take a new --workdir.")
        run.say(f"{job.name}: already drawn")
        return ticket
    searching = job.trainable == "scores"
    draw_masks = jax.jit(subnet.masks)

    def masks_of(state: TicketState) -> Tree:
        return draw_masks(state.scores, selection) if searching else selection

    masked = jax.jit(subnet.apply_masks)
    split = run.dataset.holdout if run.config.select_on == "holdout" else run.dataset.test

    def validate(state: TicketState) -> tuple[float, float]:
        variables = {"params": masked(state.params, masks_of(state)), "batch_stats": state.batch_stats}
        return run.evaluator.accuracies(variables, run.dataset, split)

    start = time.monotonic()
    best: Best = run.trainer.run(job, variables, selection, validate)
    meta = {
        "name": job.name,
        "dataset": run.config.dataset,
        "seed": run.config.seed,
        "epoch": best.epoch,
        "selected_on": run.config.select_on,
        "selection_natural": best.natural,
        "selection_robust": best.robust,
        "pattern": run.config.pattern,
        "weight_init": run.config.weight_init,
    }
    masks = jax.tree.map(np.asarray, masks_of(best.state))
    ticket = Ticket.make(run.model_spec, run.image_shape, ratio, best.state.params, masks, best.state.batch_stats, meta)
    if run.is_main:
        ticket.save(path)
    from_main(np.zeros(()))  # nobody goes on before the file is there
    kept, total = ticket.weight_counts
    run.say(
        f"{job.name}: {kept:,} of {total:,} weights, {100 * best.natural:.1f} % natural, {100 * best.robust:.1f} % "
        f"{run.evaluator.attack_record.name} on {run.config.select_on} at epoch {best.epoch}, "
        f"{time.monotonic() - start:.1f} s"
    )
    return ticket
