"""Stopping in time: a SIGTERM, or the end of the minutes given, is answered at the next safe place, by all processes at
the same one.

A process alone catches the signal and looks at its clock itself. Of several, JAX's coordination service hears of the
signal when any of them gets one, and names a place that none of them has passed; when its time is over, the first
process sends itself one.
"""

import os
import signal
import time

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 75  # EX_TEMPFAIL: stopped before the end; the same command goes on
_TO_STOP = 60.0  # seconds kept for stopping: a compilation or an evaluation may have to end first
_signalled = False
_places = 0
_minutes = 0.0
_deadline: float | None = None  # of time.monotonic


class Preempted(Exception):
    """The run was asked to stop; nothing that was finished is lost. Its words say why."""

    def __init__(self) -> None:
        super().__init__(f"stopped as the {_minutes:g} minutes end" if _is_over() else "stopped by SIGTERM")


def listen(minutes: float | None = None) -> None:
    """Begin to catch SIGTERM; with several processes JAX does, from `jax.distributed.initialize` on.

    Args:
      minutes: from now on by the first process's clock; a fifth of them, at most one, is kept for stopping.
    """
    global _signalled, _minutes, _deadline
    _signalled, _minutes, _deadline = False, minutes or 0.0, None
    if minutes is not None:
        _deadline = time.monotonic() + 60 * minutes - min(_TO_STOP, 60 * minutes / 5)
    if jax.process_count() == 1:
        signal.signal(signal.SIGTERM, _remember)


def _remember(*_: object) -> None:
    global _signalled
    _signalled = True


def _is_over() -> bool:
    return _deadline is not None and time.monotonic() >= _deadline


def asked() -> bool:
    """Whether to stop here. All processes must come by the same places in the same order."""
    global _places, _signalled
    if jax.process_count() == 1:
        return _signalled or _is_over()
    _places += 1
    if _is_over() and not _signalled and jax.process_index() == 0:
        _signalled = True  # once is enough
        os.kill(os.getpid(), signal.SIGTERM)
    return multihost_utils.reached_preemption_sync_point(_places)
