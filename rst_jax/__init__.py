"""Robust scratch tickets in JAX: draw, measure and switch between robust subnetworks of random networks.

ticket = rst_jax.load_ticket("x.ticket");  logits = ticket(images)   # [N, H, W, C] in [0, 1]
defence = rst_jax.R2S(tickets);            logits = defence(images, key)
card = rst_jax.evaluate(logits_fn, images, labels, rst_jax.ThreatModel(8 / 255))

What is named here is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from rst_jax.version import __version__

if TYPE_CHECKING:
    from rst_jax.evaluation.card import Card, evaluate
    from rst_jax.evaluation.replay import replay
    from rst_jax.models import ModelSpec
    from rst_jax.reports.card import load_card
    from rst_jax.threat import ThreatModel
    from rst_jax.tickets.file import load_ticket, save_ticket
    from rst_jax.tickets.r2s import R2S, load_r2s
    from rst_jax.tickets.ticket import Ticket

_HOME = {
    "Card": "evaluation.card",
    "ModelSpec": "models",
    "R2S": "tickets.r2s",
    "ThreatModel": "threat",
    "Ticket": "tickets.ticket",
    "evaluate": "evaluation.card",
    "load_card": "reports.card",
    "load_r2s": "tickets.r2s",
    "load_ticket": "tickets.file",
    "replay": "evaluation.replay",
    "save_ticket": "tickets.file",
}
_ROOMS = ("attacks", "interop", "models")

__all__ = [
    "R2S",
    "Card",
    "ModelSpec",
    "ThreatModel",
    "Ticket",
    "__version__",
    "evaluate",
    "load_card",
    "load_r2s",
    "load_ticket",
    "replay",
    "save_ticket",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"rst_jax.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'rst_jax' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"rst_jax.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
