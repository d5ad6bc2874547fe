"""R2S, random robust switching (the paper's defence): every image is classified by a ticket drawn at random."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rst_jax.evaluation.accuracy import Evaluator
from rst_jax.experiments.transfer import Crossed
from rst_jax.records import R2SRecord, provenance
from rst_jax.tickets.ticket import Ticket
from rst_jax.training.checkpoint import restore_tickets, save_tickets

Tree = Any


class R2S:
    """Switching between tickets, one independent draw for each image, under a key that the caller gives.

    Args:
      tickets: of one network shape.
      probabilities: of each ticket; uniform by default.

    Raises:
      ValueError: no tickets, tickets of different networks, or probabilities that do not fit or sum to 1.
    """

    def __init__(self, tickets: Sequence[Ticket], probabilities: Sequence[float] | None = None):
        if not tickets:
            raise ValueError("R2S needs at least one ticket; got none.")
        shapes = [jax.tree.map(np.shape, t.variables) for t in tickets]
        if any(t.model != tickets[0].model or s != shapes[0] for t, s in zip(tickets, shapes, strict=True)):
            raise ValueError("R2S switches between tickets of one network; these differ in model or shapes.")
        p = np.full(len(tickets), 1 / len(tickets)) if probabilities is None else np.asarray(probabilities, np.float64)
        if p.shape != (len(tickets),) or (p < 0).any() or abs(p.sum() - 1) > 1e-6:
            raise ValueError(
                f"probabilities must be {len(tickets)} numbers of at least 0 that sum to 1; got {p.tolist()}."
            )
        self.tickets, self.probabilities = list(tickets), p

    def __call__(self, images: jax.Array, key: jax.Array) -> jax.Array:
        """Logits [N, classes] of images [N, H, W, C], each from the ticket that `key` draws for it."""
        logits = jnp.stack([ticket(images) for ticket in self.tickets])
        drawn = self.draw(key, logits.shape[1])
        return jnp.take_along_axis(logits, drawn[None, :, None], axis=0)[0]

    def draw(self, key: jax.Array, n: int) -> jax.Array:
        """Which ticket classifies each of n images: int [n]."""
        return jax.random.categorical(key, jnp.log(jnp.asarray(self.probabilities, jnp.float32)), shape=(n,))


def expected_accuracy(correct: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """sum_k p_k c_k, exact over the draws: [..., K, N] flags to [..., N]."""
    return np.einsum("k,...kn->...n", np.asarray(probabilities, np.float64), correct.astype(np.float64))


def r2s_record(crossed: Crossed, tickets: list[Ticket], probabilities: np.ndarray, evaluator: Evaluator) -> R2SRecord:
    """What switching is worth on the flags of `tickets`, the first rows and columns of `crossed`."""
    k, p = len(tickets), np.asarray(probabilities, np.float64)
    after_attack = expected_accuracy(crossed.robust[:k, :k], p)  # [source, N]
    single = np.array([crossed.robust[i, i].mean() for i in range(k)])
    return R2SRecord(
        names=[t.meta["name"] for t in tickets],
        probabilities=p.tolist(),
        switching="one independent draw an image",
        natural=float(expected_accuracy(crossed.natural[:k], p).mean()),
        transfer_only=float(p @ after_attack.mean(-1)),
        worst_of_pool=float(after_attack.min(axis=0).mean()),
        best_single=float(single.max()),
        best_single_name=tickets[int(single.argmax())].meta["name"],
        n=crossed.natural.shape[-1],
        attack=evaluator.attack_record,
        digests=[t.digest for t in tickets],
        provenance=provenance(),
    )


def save_r2s(directory: Path, params: Tree, tickets: Sequence[Ticket]) -> None:
    """One checkpoint of the frozen weights with every ticket's masks and statistics, for `load_r2s`."""
    save_tickets(
        directory,
        params,
        {t.meta["name"]: {"masks": t.masks, "batch_stats": t.batch_stats} for t in tickets},
        {
            "model": tickets[0].model,
            "image_shape": list(tickets[0].image_shape),
            "tickets": {t.meta["name"]: {"remaining_ratio": t.remaining_ratio, "meta": t.meta} for t in tickets},
        },
    )


def load_r2s(directory: str | Path, probabilities: Sequence[float] | None = None) -> R2S:
    """The defence from `checkpoints/tickets` of a workdir.

    Args:
      directory: what `save_r2s` wrote.
      probabilities: see `R2S`; the tickets come in ascending order of their ratios.

    Raises:
      ValueError: the checkpoint is missing or broken.
    """
    params, stored, about = restore_tickets(Path(directory))
    tickets = [
        Ticket.make(
            about["model"],
            tuple(about["image_shape"]),
            told["remaining_ratio"],
            params,
            stored[name]["masks"],
            stored[name]["batch_stats"],
            told["meta"],
        )
        for name, told in about["tickets"].items()
    ]
    return R2S(sorted(tickets, key=lambda t: t.remaining_ratio), probabilities)
