"""Images that stay encoded until they are asked for: datasets of JPEG files of any size that no memory holds.

A split then is its records on the disk; a batch of images and their labels is read and decoded when it is indexed, by
all cores.
"""

import io
import math
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from rst_jax.data.given import MOST_CLASSES, whole_labels

T = TypeVar("T")
Record = tuple[bytes, int]  # an encoded image and its label


class EncodedImages:
    """The images of a split, indexed like an array uint8 [N, size, size, 3]; what is indexed is decoded then.

    Args:
      name: dataset, version and split, to tell in messages and digests.
      read: the records at some places of the split, encoded images with their labels; thread-safe.
      ids: the places of these images in the split, int [N].
      size: height and width of the decoded images, in pixels.
      classes: labels are below this.
    """

    dtype = np.dtype(np.uint8)

    def __init__(
        self,
        name: str,
        read: Callable[[list[int]], list[Record]],
        ids: np.ndarray,
        size: int,
        classes: int = MOST_CLASSES,
    ):
        self.name, self.ids, self.size, self.classes = name, ids, size, classes
        self._read = read

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, size, size, 3)."""
        return len(self.ids), self.size, self.size, 3

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        """The images at `index` for evaluation, centre crops: uint8 [n, size, size, 3].

        Raises:
          ValueError: an image cannot be read or decoded, or its label is none; its dataset, split and id are named.
        """
        return self.labelled(index)[0]

    def labelled(self, index: slice | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As an index, with the labels, int32 [n], of the same records."""
        return self._decoded(self.ids[index], lambda encoded, id_: centre_crop(encoded, self.size))

    def take(self, index: np.ndarray) -> "EncodedImages":
        """The images at `index`, still encoded."""
        return EncodedImages(self.name, self._read, self.ids[index], self.size, self.classes)

    def crops(self, index: np.ndarray, key: np.ndarray, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The examples at `index` for training: random resized crops, uint8 [n, size, size, 3], and labels, int32 [n].

        An image's crop follows from the key data (uint32 [2]), the epoch (from 0) and the image's id alone.

        Raises:
          ValueError: as for an index.
        """
        words = [int(word) for word in key]

        def crop(encoded: bytes, id_: int) -> np.ndarray:
            stream = np.random.Philox(key=words, counter=[0, 0, int(epoch), id_])
            return random_resized_crop(encoded, self.size, np.random.Generator(stream))

        return self._decoded(self.ids[index], crop)

    def _decoded(self, ids: np.ndarray, decode: Callable[[bytes, int], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        if np.ndim(ids) != 1:
            raise TypeError("encoded images are indexed by a slice or an array of integers [n].")
        places = [int(i) for i in ids]
        try:
            found = self._read(places)
        except ValueError:  # told in a sentence
            raise
        except Exception as error:
            where = f"examples {min(places)} to {max(places)}"
            raise ValueError(f"{self.name}, {where}: cannot be read ({type(error).__name__}: {error}).") from error
        labels = np.asarray([label for _, label in found])
        labels = whole_labels(labels, f"{self.name}: labels", len(places), self.classes, np.asarray(places))
        images = np.empty((len(places), self.size, self.size, 3), np.uint8)

        def one(row: int) -> None:
            try:
                images[row] = decode(found[row][0], places[row])
            except Exception as error:  # Pillow raises another kind for each way in which a file is broken
                raise ValueError(f"{self.name}, example {places[row]}: not a readable image ({error}).") from error

        list(_decoders().map(one, range(len(places))))
        return images, labels


@cache
def _decoders() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="decode")


def centre_crop(encoded: bytes, size: int) -> np.ndarray:
    """An image for evaluation, uint8 [size, size, 3]: its shorter side to 256/224 of `size`, then the centre.

    As torchvision's Resize and CenterCrop: bilinear, antialiased. A large JPEG is decoded at a half, a quarter or an
    eighth of its sides, at least twice the wanted ones (measured on photographs: 0.3 of 255 levels away in the mean).
    """
    image = Image.open(io.BytesIO(encoded))
    short, sides = size * 256 // 224, image.size
    image.draft(None, (2 * short, 2 * short))
    wide, high = (short * side // min(sides) for side in sides)
    left, top = round((wide - size) / 2), round((high - size) / 2)
    resized = image.convert("RGB").resize((wide, high), Image.Resampling.BILINEAR)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def random_resized_crop(encoded: bytes, size: int, generator: np.random.Generator) -> np.ndarray:
    """A random part of an image for training, resized (bilinear, antialiased) to uint8 [size, size, 3].

    As torchvision's RandomResizedCrop: area 0.08 to 1 of the image's, aspect ratio 3/4 to 4/3 (log-uniform). A large
    JPEG is decoded at a half, a quarter or an eighth of its sides, the crop at least twice `size`. Edges are blended
    with what lies beside them.
    """
    image = Image.open(io.BytesIO(encoded))
    width, height = image.size
    left, top, wide, high = _random_box(width, height, generator)
    image.draft(None, (-(-2 * size * width // wide), -(-2 * size * height // high)))
    x, y = image.size[0] / width, image.size[1] / height
    box = (left * x, top * y, min((left + wide) * x, image.size[0]), min((top + high) * y, image.size[1]))
    return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR, box))


def _random_box(width: int, height: int, generator: np.random.Generator) -> tuple[int, int, int, int]:
    """Left, top, width and height of a crop; the largest in the centre where ten tries did not fit."""
    least, most = 3 / 4, 4 / 3
    for _ in range(10):
        area = width * height * (0.08 + 0.92 * generator.random())
        ratio = least * (most / least) ** generator.random()
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            # No Generator.integers: its stream may differ between versions of NumPy.
            top, left = (int(generator.random() * (room + 1)) for room in (height - high, width - wide))
            return left, top, wide, high
    wide, high = min(width, round(height * most)), min(height, round(width / least))
    return (width - wide) // 2, (height - high) // 2, wide, high


def prefetched(batches: Iterable[T], depth: int) -> Generator[T, None, None]:
    """The same batches, `depth` of them made ahead in a background thread.

    An exception of `batches` is raised where its batch would have come. Closing the generator (or dropping it) ends
    the thread, after the batch that it is at.
    """
    iterator, end = iter(batches), object()
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as thread:
        try:
            ahead: deque[Any] = deque(thread.submit(next, iterator, end) for _ in range(depth))
            while (batch := ahead.popleft().result()) is not end:
                ahead.append(thread.submit(next, iterator, end))
                yield batch
        finally:
            thread.shutdown(cancel_futures=True)
