"""The way of training images to the step: which batch comes when, and what of it is already on the devices."""

from collections.abc import Generator
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rst_jax.data.pipeline import Images, epoch_order
from rst_jax.data.sources import Split
from rst_jax.data.stream import EncodedImages, prefetched
from rst_jax.runtime.mesh import make_tree, on_cpu, replicate

_STEPS_A_DISPATCH = 64
_AHEAD = 2  # streamed batches decoded before they are needed


def batch_sizes(n: int, batch_size: int, devices: int, tail: int | None = None) -> list[int]:
    """The batches of an epoch of n images: whole ones, then a short one of what the devices can share evenly.

    Args:
      tail: the size of the short batch where a run began on other devices; its epochs stay as they were.

    Raises:
      ValueError: the devices cannot share a batch, or there is none.
    """
    if batch_size % devices:
        raise ValueError(f"config: batch_size must be a multiple of the {devices} devices; got {batch_size}.")
    if tail is None:
        tail = n % batch_size // devices * devices
    if tail % devices:
        raise ValueError(
            f"the last batch of an epoch of this run has {tail} images, which {devices} devices cannot share; go on "
            "with a number of devices that divides it, or take a new --workdir."
        )
    if not n // batch_size and not tail:
        raise ValueError(f"config: {n} training images do not make a batch on {devices} devices.")
    return [batch_size] * (n // batch_size) + ([tail] if tail else [])


class Dispatch(NamedTuple):
    """What one call of the step gets: `steps` batches of `rows` images, from `data` at order[first:]."""

    steps: int
    rows: int
    data: Images
    order: jax.Array | np.ndarray
    first: int


class Feed:
    """The batches of a training split, epoch after epoch, in an order that hangs on the key and the epoch alone.

    Images in memory are put on every device once, and a dispatch is many steps. Encoded ones are decoded ahead, batch
    by batch, each process those of its own devices, and a dispatch is one step.

    Args:
      split: the training images.
      batch_size: images a step over all devices.
      mesh: all devices.
      keys: key data, uint32 [2] each: "order" of the epochs, "step" of what is random in a batch.
      steps_per_dispatch: at most; 0: one on a CPU, up to 64 elsewhere.
      log_every_steps: no dispatch goes past a multiple of this.

    Attributes:
      batches: the sizes of an epoch's batches.
      streamed: whether the images are decoded batch by batch.
      steps_per_dispatch: as it was settled.

    Raises:
      ValueError: as `batch_sizes`.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        mesh: Mesh,
        keys: dict[str, np.ndarray],
        *,
        steps_per_dispatch: int = 0,
        log_every_steps: int = 1,
    ):
        self.split, self.batch_size, self.mesh, self.keys = split, batch_size, mesh, keys
        self.log_every_steps, n = log_every_steps, len(split)
        self.batches = batch_sizes(n, batch_size, mesh.size)
        self.streamed = isinstance(split.images, EncodedImages)
        self.steps_per_dispatch = steps_per_dispatch or (1 if on_cpu(mesh) else _STEPS_A_DISPATCH)
        if self.streamed:
            self.steps_per_dispatch = 1
        else:
            self._data = replicate(Images.of(split.images, split.labels, split.ids, split.levels), mesh)
        self._order = jax.jit(
            lambda key, epoch: epoch_order(jax.random.wrap_key_data(key), epoch, n),
            # Batches are decoded in another thread, whose programs must not come between those over the mesh.
            out_shardings=None if self.streamed else NamedSharding(mesh, PartitionSpec()),
        )

    @property
    def left_out(self) -> int:
        """Images of an epoch that no batch takes, since the devices cannot share them evenly."""
        return len(self.split) - sum(self.batches)

    @property
    def tail(self) -> int:
        """Images of the short batch at the end of an epoch; 0 where there is none."""
        return self.batches[-1] % self.batch_size

    def keep_tail(self, tail: int) -> None:
        """Go on with the epochs of a run that began, perhaps on other devices, with a short batch of `tail` images.

        Raises:
          ValueError: these devices cannot share it.
        """
        self.batches = batch_sizes(len(self.split), self.batch_size, self.mesh.size, tail)

    def dispatches(self, step: int, total: int) -> Generator[Dispatch, None, None]:
        """The batches from `step` to `total`, in order; none crosses the end of an epoch or a log.

        To be closed where it is not used up: a streamed one has a thread.

        Raises:
          ValueError: an image cannot be read or decoded, where its batch would have come.
        """
        made = self._dispatches(step, total)
        return prefetched(made, _AHEAD) if self.streamed else made

    def _dispatches(self, step: int, total: int) -> Generator[Dispatch, None, None]:
        order_of, whole = -1, len(self.split) // self.batch_size
        while step < total:
            epoch, place = divmod(step, len(self.batches))
            if order_of != epoch:
                order, order_of = self._order(self.keys["order"], np.int32(epoch)), epoch
            rows, first = self.batches[place], place * self.batch_size
            until_log = self.log_every_steps - step % self.log_every_steps
            count = max(1, min(self.steps_per_dispatch, whole - place, until_log))
            if self.streamed:
                data = self._decoded(np.asarray(order)[first : first + rows], epoch)
                yield Dispatch(1, rows, data, np.zeros(0, np.int32), 0)
            else:
                yield Dispatch(count, rows, self._data, order, first)
            step += count

    def _decoded(self, index: np.ndarray, epoch: int) -> Images:
        """A batch of encoded images, cropped at random."""
        encoded = self.split.images
        assert isinstance(encoded, EncodedImages)

        def examples(rows: slice) -> Images:
            cropped, labels = encoded.crops(index[rows], self.keys["step"], epoch)
            return Images.of(cropped, labels, self.split.ids[index[rows]], self.split.levels)

        made: Images = make_tree(len(index), examples, self.mesh)
        return made
