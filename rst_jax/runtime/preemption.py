"""Stopping in time: a SIGTERM is answered at the next safe place, by all processes at the same one.

A process alone catches the signal itself. Of several, JAX's coordination service hears of it when any of them gets
one, and names a place that none of them has passed.
"""

import signal

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 75  # EX_TEMPFAIL: stopped before the end; the same command goes on
_signalled = False
_places = 0


class Preempted(Exception):
    """The run was asked to stop; nothing that was finished is lost."""


def listen() -> None:
    """Begin to catch SIGTERM; with several processes JAX does, from `jax.distributed.initialize` on."""
    if jax.process_count() == 1:
        signal.signal(signal.SIGTERM, _remember)


def _remember(*_: object) -> None:
    global _signalled
    _signalled = True


def asked() -> bool:
    """Whether to stop here. All processes must come by the same places in the same order."""
    global _places
    if jax.process_count() == 1:
        return _signalled
    _places += 1
    return multihost_utils.reached_preemption_sync_point(_places)
