"""What lies around the work of a command: other processes, programs kept on the disk, and how the work may end."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import jax

_LOST_AFTER = 60  # seconds without a sign of life from a process, after which the others end


class Failed(Exception):
    """The work failed; starting it again as it is would fail again."""


class Lost(Exception):
    """Another process was lost or not found; all of them may be started again."""


@contextlib.contextmanager
def at_work(
    kinds: type[Exception] | tuple[type[Exception], ...] = (ValueError, FloatingPointError, OSError), advice: str = ""
) -> Iterator[None]:
    """Within it, errors of these kinds are the work's and no longer the command's.

    Raises:
      Failed: such an error, in its words and `advice`, or one of the accelerator.
      Lost: another process was lost.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or "RESOURCE_EXHAUSTED" in str(error):
            raise Failed(str(error)) from error
        raise Lost(f"another process was lost ({error}); start all of them again.") from error
    except kinds as error:
        raise Failed(f"{error}{advice}") from error


def connect(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Join the other processes, if there are any.

    Args:
      coordinator: address of process 0, "auto" where the cluster tells all three, or None for one process.

    Raises:
      ValueError: an option is missing.
      Lost: they could not be joined.
    """
    if coordinator is None:
        if num_processes is not None or process_id is not None:
            raise ValueError("--num_processes and --process_id need --coordinator=HOST:PORT.")
        return
    where = {"coordinator_address": coordinator, "num_processes": num_processes, "process_id": process_id}
    if coordinator == "auto":
        where = {}
    if None in where.values():
        raise ValueError("--coordinator=HOST:PORT needs --num_processes and --process_id.")
    try:
        jax.distributed.initialize(**where, heartbeat_timeout_seconds=_LOST_AFTER)  # type: ignore[arg-type]
    except RuntimeError as error:
        raise Lost(f"the processes could not join at {coordinator}: {error}") from error


def keep_programs(folder: str) -> None:
    """Keep compiled programs in a folder, unless there is none or the environment names one."""
    if folder and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
