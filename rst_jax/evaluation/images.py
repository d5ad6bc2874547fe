"""Adversarial images that no memory needs to hold: a cascade's on the disk, and the file of a whole card."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from rst_jax.evaluation.evidence import Examples
from rst_jax.runtime.files import Pieces, make_folder, write_arrays_in_pieces

_AT_ONCE = 250  # images


@dataclasses.dataclass(frozen=True)
class ImageFile:
    """The adversarial images of a cascade, float32 [n, H, W, C], zeros where there is none; a disk holds no zeros.

    Attributes:
      path: an .npy file.
    """

    path: Path

    def make(self, shape: tuple[int, ...]) -> None:
        """Make it anew; what lies there may be a link to another file."""
        make_folder(self.path.parent)
        self.path.unlink(missing_ok=True)
        np.lib.format.open_memmap(self.path, "w+", np.float32, shape)

    def put(self, index: np.ndarray, images: np.ndarray) -> None:
        """Those of the examples `index`, float32 [k, H, W, C]."""
        with self.path.open("r+b") as file:  # no memory map: a full disk would end the process
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            first = file.tell()
            for place, image in zip(index.tolist(), np.ascontiguousarray(images, np.float32), strict=True):
                file.seek(first + place * image.nbytes)
                file.write(image.data)

    def get(self, index: np.ndarray) -> np.ndarray:
        """As they were put: [k, H, W, C]."""
        return np.array(np.lib.format.open_memmap(self.path, "r")[index])


def write_images(path: Path, examples: Examples, broken: dict[str, tuple[np.ndarray, ImageFile]]) -> None:
    """adversarials.npz: clean images, labels, ids, and of each cascade the adversarial images (clean where none is).

    Args:
      path: of the file.
      examples: of the card.
      broken: by the array's name, which of the cascade's examples are broken, bool [n], and their images.
    """
    shape = examples.image_shape

    def pieces(n: int, hit: np.ndarray | None = None, file: ImageFile | None = None) -> Iterator[np.ndarray]:
        for first in range(0, n, _AT_ONCE):
            index = np.arange(first, min(first + _AT_ONCE, n))
            images = examples.read(index)
            if hit is not None and file is not None:
                images[hit[index]] = file.get(index[hit[index]])
            yield images

    told = {"label": examples.labels, "id": examples.ids}
    images = {"clean": Pieces((len(examples), *shape), np.dtype(np.float32), pieces(len(examples)))}
    for name, (hit, file) in broken.items():
        images[name] = Pieces((len(hit), *shape), np.dtype(np.float32), pieces(len(hit), hit, file))
    write_arrays_in_pieces(path, {**told, **images})
