"""Random robust switching: what it is worth against attacks on single tickets."""

import numpy as np

from rst_jax.experiments.run import Run
from rst_jax.experiments.transfer import Crossed, cross
from rst_jax.records import AttackRecord, R2SRecord, provenance
from rst_jax.tickets.r2s import expected_accuracy, load_r2s
from rst_jax.tickets.ticket import Ticket


def switch(run: Run) -> None:
    """The record of uniform switching between the drawn tickets, as `load_r2s` gives them.

    Needs the tickets and their checkpoint (`search`, `dense`).

    Raises:
      ValueError: the checkpoint holds other tickets.
    """
    tickets = run.tickets()
    drawn = [place for place, ticket in enumerate(tickets) if ticket.kind == "scratch"]
    stored = {ticket.name: ticket.digest for ticket in load_r2s(run.store.checkpoint).tickets}
    for ticket in (tickets[place] for place in drawn):
        if stored.get(ticket.name) != ticket.digest:
            raise ValueError(
                f"{run.workdir}: {ticket.name} is not the same in tickets/ and checkpoints/tickets; run with "
                "--config.stages=('search',), which writes the latter again."
            )
    crossed = cross(run, tickets).among(drawn)
    uniform = np.full(len(drawn), 1 / len(drawn))
    run.keep("r2s", r2s_record(crossed, [tickets[place] for place in drawn], uniform, run.evaluator.attack_record))


def r2s_record(crossed: Crossed, tickets: list[Ticket], probabilities: np.ndarray, attack: AttackRecord) -> R2SRecord:
    """What switching between `tickets` is worth on their flags."""
    k, p = len(tickets), np.asarray(probabilities, np.float64)
    after_attack = expected_accuracy(crossed.robust, p)  # [source, N]
    single = np.array([crossed.robust[i, i].mean() for i in range(k)])
    return R2SRecord(
        names=[t.name for t in tickets],
        probabilities=p.tolist(),
        switching="one independent draw an image",
        natural=float(expected_accuracy(crossed.natural, p).mean()),
        transfer_only=float(p @ after_attack.mean(-1)),
        worst_of_pool=float(after_attack.min(axis=0).mean()),
        best_single=float(single.max()),
        best_single_name=tickets[int(single.argmax())].name,
        n=crossed.natural.shape[-1],
        attack=attack,
        digests=[t.digest for t in tickets],
        provenance=provenance(),
    )
