"""Orbax checkpoints of training: the latest and the best state of each network.

Layout below `checkpoints/`: `<network>/latest/<step>` and `<network>/best/<step>`. Orbax writes to a temporary name and
renames, so a kill leaves the checkpoint before.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from rst_jax.runtime.files import make_folder
from rst_jax.runtime.work import cause
from rst_jax.training.state import TicketState


def _manager(directory: Path, keep: int) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
    return ocp.CheckpointManager(directory.absolute(), options=options)


class RunCheckpoints:
    """The latest and best checkpoint of one run.

    A state is saved with its progress: plain values (epoch, best figure so far, ...), all that the loop needs to
    go on. The best is always saved before the latest that speaks of it.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        make_folder(directory)
        # Two of the best: a kill may come after a new one is saved and before the latest that speaks of it.
        self._latest, self._best = _manager(directory / "latest", 1), _manager(directory / "best", 2)

    def save_latest(self, state: TicketState, progress: dict[str, Any]) -> None:
        """Save the state after its step, replacing the one before; nothing where that step is saved already."""
        step = int(state.step)
        if step == self._latest.latest_step():
            return
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress))
        with _writing(self.directory / "latest"):
            self._latest.save(step, args=args)

    def save_best(self, state: TicketState) -> None:
        """Save the state as the best so far."""
        step = int(state.step)
        with _writing(self.directory / "best"):
            self._best.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state)), force=True)

    def restore_latest(self, like: TicketState) -> tuple[TicketState, dict[str, Any]] | None:
        """The latest state and its progress, placed as `like`; None when there is none.

        Raises:
          ValueError: the checkpoint is broken or of another network; its folder is named.
        """
        step = self._latest.latest_step()
        for manager, keep in ((self._latest, 1), (self._best, 2)):
            for old in sorted(manager.all_steps())[:-keep]:
                manager.delete(old)  # a kill came while it was removed
        for ahead in [s for s in self._best.all_steps() if s > (step or 0)]:
            self._best.delete(ahead)  # of the stretch that is now run again
        if step is None:
            return None
        args = ocp.args.Composite(state=ocp.args.StandardRestore(_abstract(like)), progress=ocp.args.JsonRestore())
        try:
            restored = self._latest.restore(step, args=args)
        except Exception as error:  # Orbax and TensorStore raise many kinds
            raise ValueError(
                f"{self.directory / 'latest' / str(step)}: this checkpoint cannot be read ({cause(error)}). "
                "Move its folder away to start this run again, or take a fresh --workdir."
            ) from error
        return restored.state, restored.progress

    def restore_best(self, like: TicketState, step: int) -> TicketState:
        """The best state, saved at `step`."""
        args = ocp.args.Composite(state=ocp.args.StandardRestore(_abstract(like)))
        try:
            return self._best.restore(step, args=args).state
        except Exception as error:  # as above
            raise ValueError(
                f"{self.directory / 'best' / str(step)}: this checkpoint cannot be read ({cause(error)})."
            ) from error

    def close(self) -> None:
        """Wait for Orbax and release its threads."""
        self._latest.close()
        self._best.close()


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError:  # of other processes
        raise
    except Exception as error:  # Orbax and TensorStore raise many kinds
        raise OSError(f"{folder}: the checkpoint could not be written ({cause(error)}).") from error


def _abstract(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree)
