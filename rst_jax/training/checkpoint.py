"""Orbax checkpoints of training: the latest and the best state of each network.

Layout below `checkpoints/`: `<network>/latest/<step>` and `<network>/best/<step>`. Orbax writes to a temporary name and
renames, so a kill leaves the checkpoint before.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from rst_jax.records import digest
from rst_jax.runtime.files import make_folder
from rst_jax.runtime.mesh import fetch, is_main
from rst_jax.runtime.progress import Say
from rst_jax.runtime.work import cause
from rst_jax.training.state import TicketState

_DIGEST = "digest"  # of the state and the progress, in another file than either
# Kept: one behind the latest; of the best those that these speak of, and one more, as a kill may come after a new one
# is saved and before the latest that speaks of it.
_LATEST, _BEST = 2, 3
_REMOVED = ".removed-old"  # where Orbax puts a checkpoint at once, so that none is ever there in part


def _manager(directory: Path, keep: int) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False, todelete_subdir=_REMOVED)
    return ocp.CheckpointManager(directory.absolute(), options=options)


class RunCheckpoints:
    """The latest and best checkpoints of one run.

    A state is saved with its progress: plain values (epoch, best figure so far, ...), all that the loop needs to
    go on. The best is always saved before the latest that speaks of it, so that going on from any of the latest finds
    its best. What is restored is compared with the digest of what was saved: Orbax reads a flipped bit without a word.

    Args:
      directory: of the run's checkpoints.
      say: told of a checkpoint that cannot be used.
    """

    def __init__(self, directory: Path, say: Say = lambda text: None):
        self.directory, self.say = directory, say
        make_folder(directory)
        self._latest, self._best = _manager(directory / "latest", _LATEST), _manager(directory / "best", _BEST)

    def save_latest(self, state: TicketState, progress: dict[str, Any]) -> None:
        """Save the state after its step; nothing where that step is saved already."""
        step = int(state.step)
        if step == self._latest.latest_step():
            return
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress))
        with _writing(self.directory / "latest"):
            self._latest.save(step, args=args, custom_metadata={_DIGEST: _digest(state, progress)})
        self._clear()

    def save_best(self, state: TicketState) -> None:
        """Save the state as the best so far."""
        step, args = int(state.step), ocp.args.Composite(state=ocp.args.StandardSave(state))
        with _writing(self.directory / "best"):
            self._best.save(step, args=args, custom_metadata={_DIGEST: _digest(state)}, force=True)
        self._clear()

    def restore_latest(self, like: TicketState) -> tuple[TicketState, dict[str, Any]] | None:
        """The latest state that is as it was saved, as is the best it speaks of; None when there is none.

        With its progress, and placed as `like`. Of those after it, which are broken, `say` is told.

        Raises:
          ValueError: none of the checkpoints can be used; a folder is named.
        """
        for manager, keep in ((self._latest, _LATEST), (self._best, _BEST)):
            for old in sorted(manager.all_steps())[:-keep]:
                manager.delete(old)  # a kill came while it was removed
        steps, faults = sorted(self._latest.all_steps(), reverse=True), list[str]()
        for step in steps:
            try:
                state, progress = self._restored(step, like)
            except ValueError as error:
                faults.append(str(error))
                continue
            for fault, broken in zip(faults, steps, strict=False):
                self.say(f"{fault} Going on from the one before, of step {step}.")
                self._latest.delete(broken)
            self._forget_after(step)
            return state, progress
        if faults:
            raise ValueError(f"{faults[0]} Move its folder away to start this run again, or take a fresh --workdir.")
        self._forget_after(0)
        return None

    def _forget_after(self, step: int) -> None:
        for ahead in [s for s in self._best.all_steps() if s > step]:
            self._best.delete(ahead)  # of the stretch that is now run again

    def _restored(self, step: int, like: TicketState) -> tuple[TicketState, dict[str, Any]]:
        args = ocp.args.Composite(state=ocp.args.StandardRestore(_abstract(like)), progress=ocp.args.JsonRestore())
        with _reading(self.directory / "latest" / str(step)):
            restored = self._latest.restore(step, args=args)
            progress = dict(restored.progress)
            _compare(self._latest, step, restored.state, progress)
            best = int(progress.get("best_step", -1))
        if best >= 0:
            self.restore_best(like, best)
        return restored.state, progress

    def restore_best(self, like: TicketState, step: int) -> TicketState:
        """The best state, saved at `step`.

        Raises:
          ValueError: it is not what was saved; its folder is named. (Going on from `restore_latest` makes it again.)
        """
        args = ocp.args.Composite(state=ocp.args.StandardRestore(_abstract(like)))
        with _reading(self.directory / "best" / str(step)):
            state = self._best.restore(step, args=args).state
            _compare(self._best, step, state)
        return state

    def _clear(self) -> None:
        if is_main():
            for kind in ("latest", "best"):
                shutil.rmtree(self.directory / kind / _REMOVED, ignore_errors=True)

    def close(self) -> None:
        """Wait for Orbax and release its threads."""
        self._clear()
        self._latest.close()
        self._best.close()


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError:  # of other processes, or of memory
        raise
    except Exception as error:  # Orbax and TensorStore raise many kinds
        raise ValueError(f"{folder}: this checkpoint cannot be used ({cause(error)}).") from error


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError:  # of other processes
        raise
    except Exception as error:  # Orbax and TensorStore raise many kinds
        raise OSError(f"{folder}: the checkpoint could not be written ({cause(error)}).") from error


def _digest(state: TicketState, progress: Mapping[str, Any] | None = None) -> str:
    told = np.frombuffer(json.dumps(progress, sort_keys=True).encode(), np.uint8)
    return digest(fetch(state), {"progress": told} if progress is not None else {})


def _compare(
    manager: ocp.CheckpointManager, step: int, state: TicketState, progress: Mapping[str, Any] | None = None
) -> None:
    """See that it is what was saved; version 0.4.0 and those before told no digest."""
    saved = (manager.metadata(step).custom_metadata or {}).get(_DIGEST)
    if saved is not None and _digest(state, progress) != saved:
        raise ValueError("it is not what was saved: its digest is another")


def _abstract(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree)
