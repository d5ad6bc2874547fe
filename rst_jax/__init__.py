"""Robust scratch tickets in JAX: draw, measure and switch between robust subnetworks of random networks.

ticket = rst_jax.load_ticket("x.ticket");  logits = ticket(images)   # [N, H, W, C] in [0, 1]
defence = rst_jax.R2S(tickets);            logits = defence(images, key)
card = rst_jax.evaluate(logits_fn, images, labels, rst_jax.ThreatModel(8 / 255))
"""

from rst_jax.evaluation.card import Card, evaluate, replay
from rst_jax.reports.card import load_card
from rst_jax.threat import ThreatModel
from rst_jax.tickets.file import load_ticket
from rst_jax.tickets.r2s import R2S, load_r2s
from rst_jax.tickets.ticket import Ticket
from rst_jax.version import __version__

__all__ = [
    "R2S",
    "Card",
    "ThreatModel",
    "Ticket",
    "__version__",
    "evaluate",
    "load_card",
    "load_r2s",
    "load_ticket",
    "replay",
]
