"""What lies around the work of a command: other processes, programs kept on the disk, and how the work may end.

Nothing heavy is imported here before it is needed.
"""

import contextlib
import glob
import importlib.util
import os
import re
import signal
import sys
from collections.abc import Iterator
from typing import Any

from rst_jax.runtime.paths import local_path
from rst_jax.runtime.preemption import EXIT_CODE

_LOST_AFTER = 60  # seconds without a sign of life from a process, after which the others end
_LOST = "another process was lost{}; start all of them again."
_LONG = 300  # letters
_kept: list[Any] = []  # what C calls
_code: int | None = None  # the exit code, when it is known


def quiet() -> None:
    """Keep other libraries from telling errors, with tracebacks of all their threads: what they raise is told once."""
    import logging

    from absl import logging as absl

    for logger in (absl.get_absl_logger(), logging.getLogger("asyncio")):
        logger.addFilter(lambda record: False)
    sys.unraisablehook = lambda unraisable: None  # of TensorStore's threads


def cause(error: BaseException) -> str:
    """What another library raised, in few words: the operating system's, or the first line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if code := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(code[1]))
    first = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return first if len(first) < _LONG else f"{first[:_LONG]} ..."


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
    import jax

    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or "RESOURCE_EXHAUSTED" in str(error):
            raise Failed(cause(error)) from error
        raise Lost(_LOST.format(f" ({cause(error)})")) from error
    except kinds as error:
        told = cause(error) if isinstance(error, OSError) else error
        raise Failed(f"{told}{advice}") from error


def connect(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Join the other processes, if there are any.

    Args:
      coordinator: address of process 0, "auto" where the cluster tells all three, or None for one process.

    Raises:
      ValueError: an option is missing or not right, or no cluster tells.
      Lost: they could not be joined.
    """
    if coordinator is None:
        if num_processes is not None or process_id is not None:
            raise ValueError("--num_processes and --process_id need --coordinator=HOST:PORT.")
        return
    where = _where(coordinator, num_processes, process_id)
    from concurrent.futures import ThreadPoolExecutor

    import jax

    try:
        with ThreadPoolExecutor(1) as waiting:  # in another thread, since a signal is heard only in Python
            limits: dict[str, Any] = {f"{what}_timeout_seconds": _LOST_AFTER for what in ("heartbeat", "shutdown")}
            waiting.submit(jax.distributed.initialize, **where, **limits).result()
    except RuntimeError as error:
        raise Lost(f"the processes could not join at {coordinator}: {cause(error)}") from error
    except Exception as error:  # each kind of cluster misses its own things
        raise ValueError(
            f"--coordinator={coordinator}: no cluster tells who takes part ({cause(error)}); take "
            "--coordinator=HOST:PORT with --num_processes and --process_id, or none of them for one process."
        ) from error
    _end_as_lost()


def _where(coordinator: str, num_processes: int | None, process_id: int | None) -> dict[str, Any]:
    """As `jax.distributed.initialize` takes it; what is None the cluster tells."""
    where = {"coordinator_address": coordinator, "num_processes": num_processes, "process_id": process_id}
    if coordinator == "auto":
        return where | {"coordinator_address": None}
    host, _, port = coordinator.rpartition(":")
    if not (host and re.fullmatch("[0-9]{1,5}", port) and 0 < int(port) < 2**16):
        raise ValueError(f"expected --coordinator=HOST:PORT, as localhost:12345, or auto; got {coordinator!r}.")
    if num_processes is None or process_id is None:
        raise ValueError("--coordinator=HOST:PORT needs --num_processes and --process_id.")
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"--process_id must lie in 0 to --num_processes - 1; got {process_id} of {num_processes} processes."
        )
    return where


def _end_as_lost() -> None:
    """Let an abort end the process as `Lost` does: JAX aborts in C++ when it hears that another process died."""
    import ctypes

    def lost(_: int) -> None:
        if _code is None:
            os.write(2, f"rst_jax: {_LOST.format('')}\n".encode())
        os._exit(EXIT_CODE if _code is None else _code)

    _kept.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(lost))
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(_kept[-1], ctypes.c_void_p))


def ends_with(code: int) -> None:
    """The exit code is known; what other processes do changes it no more."""
    global _code
    _code = code


def find_devices() -> None:
    """See that there is something to compute on.

    Raises:
      ValueError: there is not, or not what JAX_PLATFORMS names.
      Lost: another process was lost meanwhile.
    """
    import jax

    try:
        with without_standard_error() if _compilers_alone() else contextlib.nullcontext():
            jax.devices()
    except Exception as error:  # each platform raises its own
        if re.search("DEADLINE_EXCEEDED|UNAVAILABLE", str(error)) and jax.distributed.is_initialized():
            raise Lost(_LOST.format(f" ({cause(error)})")) from error
        asked = os.environ.get("JAX_PLATFORMS")
        hint = f"JAX_PLATFORMS={asked} cannot be had here" if asked else "no device can be used"
        told = cause(error).rstrip(".") if str(error) else "JAX finds no such device"
        raise ValueError(f"{hint}: {told}.") from error


def _compilers_alone() -> bool:
    """Whether libraries are here that serve `plan` as compilers and find no device of theirs, which they would tell."""
    tpus = any(glob.glob(pattern) for pattern in ("/dev/accel*", "/dev/vfio/*"))
    cuda = is_installed("jax_plugins.xla_cuda13") and not is_installed("jax_cuda13_plugin")
    return cuda or (is_installed("libtpu") and not tpus)


def is_installed(module: str) -> bool:
    """Whether a module can be imported; the packages around it are, but not the module."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@contextlib.contextmanager
def without_standard_error() -> Iterator[None]:
    """Of this process and its libraries; what they raise is raised."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def keep_programs(folder: str) -> None:
    """Keep compiled programs in a folder, unless there is none or the environment names one.

    Raises:
      ValueError: it lies in the home of a user who is not known.
    """
    import jax

    if folder and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        if "://" not in folder:  # which JAX knows
            with contextlib.suppress(ValueError) if folder.startswith("~/") else contextlib.nullcontext():
                folder = str(local_path(folder))
        if folder[0] != "~":  # a process without a home keeps none
            jax.config.update("jax_compilation_cache_dir", folder)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
