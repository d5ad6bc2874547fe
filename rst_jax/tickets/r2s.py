"""R2S, random robust switching (the paper's defence): every image is classified by a ticket picked at random."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from rst_jax.runtime.paths import local_path
from rst_jax.tickets.store import restore_tickets
from rst_jax.tickets.ticket import Ticket


class R2S:
    """Switching between tickets, one independent pick for each image, under a key that the caller gives.

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
        n = len(tickets)
        self.tickets = list(tickets)
        self.probabilities = np.full(n, 1 / n) if probabilities is None else _checked(probabilities, n)

    def __call__(self, images: jax.Array, key: jax.Array) -> jax.Array:
        """Logits [N, classes] of images [N, H, W, C], each from the ticket that `key` picks for it."""
        logits = jnp.stack([ticket(images) for ticket in self.tickets])
        picked = self.pick(key, logits.shape[1])
        return jnp.take_along_axis(logits, picked[None, :, None], axis=0)[0]

    def pick(self, key: jax.Array, n: int) -> jax.Array:
        """Which ticket classifies each of n images: int [n]."""
        return jax.random.categorical(key, jnp.log(jnp.asarray(self.probabilities, jnp.float32)), shape=(n,))


def _checked(probabilities: Sequence[float], n: int) -> np.ndarray:
    """Of n tickets: float64 [n]."""
    given = np.asarray(probabilities, object)
    try:
        p = given.astype(np.float64)
    except (TypeError, ValueError):  # no numbers
        p = np.full(given.shape, np.nan)
    if p.shape != (n,) or not ((p >= 0).all() and abs(p.sum() - 1) <= 1e-6):
        raise ValueError(f"probabilities must be {n} numbers of at least 0 that sum to 1; got {given.tolist()!r:.200}.")
    return p


def expected_accuracy(correct: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """sum_k p_k c_k, exact over the picks: [..., K, N] flags to [..., N]."""
    return np.einsum("k,...kn->...n", np.asarray(probabilities, np.float64), correct.astype(np.float64))


def load_r2s(directory: str | Path, probabilities: Sequence[float] | None = None) -> R2S:
    """The defence from `checkpoints/tickets` of a workdir.

    Args:
      directory: what `tickets.store.save_tickets` wrote.
      probabilities: see `R2S`; the tickets come in ascending order of their ratios.

    Raises:
      ValueError: the checkpoint is missing or broken.
    """
    return R2S(restore_tickets(local_path(directory)), probabilities)
