"""Stopping in time: a signal, or the end of the minutes given.

Until a folder is held nothing can be lost, and SIGTERM and Ctrl-C end the command at once. From then on Ctrl-C is a
KeyboardInterrupt, and SIGTERM is answered at the next safe place, by all processes at the same one: a process alone
remembers the signal and looks at its clock itself. Of several, JAX's coordination service hears of the signal when any
of them gets one, and names a place that none of them has passed; when its time is over, the first process sends itself
one.

Nothing heavy is imported here before it is needed, so that the first line of the command can catch signals.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

EXIT_CODE = 75  # EX_TEMPFAIL: stopped before the end; the same command goes on
_TO_STOP = 60.0  # seconds kept for stopping: a compilation or an evaluation may have to end first
_signalled = _interrupted = False
_remembering = 0  # how many folders are held
_places = 0
_minutes = 0.0
_deadline: float | None = None  # of time.monotonic


class Preempted(Exception):
    """The run was asked to stop; nothing that was finished is lost. Its words say why."""

    def __init__(self) -> None:
        super().__init__(f"stopped as the {_minutes:g} minutes end" if _is_over() else "stopped by SIGTERM")


def catch(end: Callable[[BaseException], Any]) -> None:
    """Begin to catch SIGTERM and Ctrl-C, unless the process is to ignore them.

    With several processes JAX catches SIGTERM from `jax.distributed.initialize` on.

    Args:
      end: ends the process, with what would have been raised; it is called where nothing can be lost.
    """
    global _signalled, _interrupted
    _signalled = _interrupted = False

    def terminated(*_: object) -> None:
        global _signalled
        if not _remembering:
            end(Preempted())
        _signalled = True

    def interrupted(*_: object) -> None:
        global _interrupted
        if _interrupted or not _remembering:
            end(KeyboardInterrupt())
        _interrupted = True  # for `asked`, where this is swallowed: Python raises nothing out of a finalizer
        raise KeyboardInterrupt

    for number, handler in ((signal.SIGTERM, terminated), (signal.SIGINT, interrupted)):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


@contextlib.contextmanager
def remembered() -> Iterator[None]:
    """Within it, signals wait for the next safe place."""
    global _remembering
    _remembering += 1
    try:
        yield
    finally:
        _remembering -= 1


def listen(minutes: float | None = None) -> None:
    """Begin to look at the clock.

    Args:
      minutes: from now on by the first process's clock; a fifth of them, at most one, is kept for stopping.
    """
    global _minutes, _deadline
    _minutes, _deadline = minutes or 0.0, None
    if minutes is not None:
        _deadline = time.monotonic() + 60 * minutes - min(_TO_STOP, 60 * minutes / 5)


def _is_over() -> bool:
    return _deadline is not None and time.monotonic() >= _deadline


def asked() -> bool:
    """Whether to stop here. All processes must come by the same places in the same order.

    Raises:
      KeyboardInterrupt: Ctrl-C was pressed before, and something swallowed it.
    """
    global _places, _signalled
    import jax
    from jax.experimental import multihost_utils

    if _interrupted:
        raise KeyboardInterrupt
    if jax.process_count() == 1:
        return _signalled or _is_over()
    _places += 1
    if _is_over() and not _signalled and jax.process_index() == 0:
        _signalled = True  # once is enough
        os.kill(os.getpid(), signal.SIGTERM)
    return multihost_utils.reached_preemption_sync_point(_places)
