"""Robust scratch tickets in JAX: draw, measure and switch between robust subnetworks of random networks.

ticket = rst_jax.load_ticket("x.ticket");  logits = ticket(images)   # [N, H, W, C] in [0, 1]
defence = rst_jax.R2S(tickets);            logits = defence(images, key)
"""

from rst_jax.r2s import R2S, load_r2s
from rst_jax.ticket import Ticket, load_ticket
from rst_jax.version import __version__

__all__ = ["R2S", "Ticket", "__version__", "load_r2s", "load_ticket"]
