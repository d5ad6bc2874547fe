"""Where images come from: the embedded digits, array files, TFDS.

All of them end as a `Dataset`: training, held-out and test images as integers, with the constants that turn them into a
network's input. Those that the catalogue calls streamed stay on the disk, and their labels with them.
"""

import dataclasses
from functools import cached_property

import numpy as np

from rst_jax.config import Config
from rst_jax.data.arrays import both_splits, test_split
from rst_jax.data.catalog import CATALOG
from rst_jax.data.prepared import Prepared
from rst_jax.data.stream import EncodedImages
from rst_jax.records import digest
from rst_jax.runtime.paths import local_path


@dataclasses.dataclass(frozen=True)
class Split:
    """A split of a dataset, or a part of one.

    Attributes:
      images: uint8 [N, H, W, C], in memory or encoded.
      labels: int32 [N]; None where the images are encoded: a label is read with its image, by `batch`.
      ids: an example's place in the source's split, int32 [N].
      levels: the integer that means 1.0 (255; 16 for the digits).
    """

    images: np.ndarray | EncodedImages
    labels: np.ndarray | None
    ids: np.ndarray
    levels: int = 255

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, index: np.ndarray) -> "Split":
        """The examples at `index`, with their ids; encoded images stay so."""
        images = self.images.take(index) if isinstance(self.images, EncodedImages) else self.images[index]
        labels = None if self.labels is None else self.labels[index]
        return dataclasses.replace(self, images=images, labels=labels, ids=self.ids[index])

    def batch(self, index: slice | np.ndarray = slice(None)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The examples at `index` (all of them), read once: images float32 in [0, 1], labels and ids int32 [n].

        Raises:
          ValueError: an encoded image cannot be read or decoded; it is named.
        """
        if isinstance(self.images, EncodedImages):
            images, labels = self.images.labelled(index)
        else:
            assert self.labels is not None
            images, labels = self.images[index], self.labels[index]
        return images.astype(np.float32) / np.float32(self.levels), labels, self.ids[index]

    def scaled(self) -> np.ndarray:
        """All images as float32 in [0, 1]."""
        return self.images[:].astype(np.float32) / np.float32(self.levels)


class SplitImages:
    """The images of a split as float32 in [0, 1], read when they are asked for.

    Args:
      split: in memory or encoded.

    Attributes:
      labels: int32 [N]; of an encoded image 0 until it was read.
    """

    def __init__(self, split: Split):
        self.split = split
        self.labels = np.zeros(len(split), np.int32) if split.labels is None else split.labels.copy()

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: np.ndarray, /) -> np.ndarray:
        """Those at the places `index`, int [n]: float32 [n, H, W, C]."""
        images, self.labels[index], _ = self.split.batch(index)
        return images


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A dataset, in memory or streamed.

    Attributes:
      mean, std: of each channel, on the [0, 1] scale.
    """

    name: str
    train: Split
    holdout: Split
    test: Split
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all images and labels; of streamed images, of what they are called, their shape and ids."""
        return digest({k: _content(s) for k, s in vars(self).items() if isinstance(s, Split)})


def load_dataset(config: Config) -> Dataset:
    """The dataset that the configuration names.

    The held-out images are a fixed subset of the training images: those whose numbers from a Philox stream of
    key 0 are the smallest `holdout`.

    Raises:
      ValueError: missing or malformed data; the message says what to do.
    """
    train, test, names = _splits(config.dataset, config.data_dir, config.data_path)
    if config.holdout >= len(train):
        raise ValueError(
            f"config: holdout must be smaller than the {len(train)} training images; got {config.holdout}."
        )
    order = np.argsort(np.random.Philox(key=0).random_raw(len(train)), kind="stable")
    rest, held_out = (
        train.take(np.sort(order[config.holdout :])),
        train.take(np.sort(order[: config.holdout])),
    )
    if config.train_examples:
        rest = rest.take(np.arange(min(config.train_examples, len(rest))))
    if config.evaluate.examples:
        test = test.take(np.arange(min(config.evaluate.examples, len(test))))
    facts = CATALOG.get(config.dataset)
    if facts and facts.mean and facts.std:
        mean, std = facts.mean, facts.std
    else:
        mean, std = _statistics(np.asarray(rest.images), rest.levels)
    return Dataset(config.dataset, rest, held_out, test, len(names), mean, std, names)


def load_test(name: str, data_dir: str, data_path: str, examples: int = 0, skip: int = 0) -> Split:
    """The test images; those after the first `skip`, and of these the first `examples`, or all for 0.

    There need be no others: neither in TFDS's folder nor in an .npz file; an .npy file of images will do too.

    Raises:
      ValueError: missing or malformed data; the message says what to do.
    """
    if name == "digits":
        _, test = _digits()
    elif name == "npz":
        test = _split(*test_split(local_path(data_path)))
    else:
        test = _prepared(Prepared(name, local_path(data_dir)), _tested(name))
    if skip >= len(test):
        raise ValueError(f"{name} has {len(test)} test images; expected to skip fewer, got {skip}.")
    return test.take(np.arange(skip, min(skip + (examples or len(test)), len(test))))


def _splits(name: str, data_dir: str, data_path: str) -> tuple[Split, Split, tuple[str, ...]]:
    """Training and test images, and the classes' names: their numbers, if nothing else is known."""
    if name == "digits":
        return *_digits(), tuple(map(str, range(10)))
    if name == "npz":
        train, test, classes = both_splits(local_path(data_path))
        return _split(*train), _split(*test), tuple(map(str, range(classes)))
    data = Prepared(name, local_path(data_dir))
    return _prepared(data, "train"), _prepared(data, _tested(name)), data.class_names


def _prepared(data: Prepared, part: str) -> Split:
    facts = CATALOG.get(data.name)
    if facts and facts.streamed:
        return _split(data.encoded(part, facts.streamed), None)
    return _split(*data.examples(part))


def _tested(name: str) -> str:
    """The split of TFDS's that tests."""
    return CATALOG[name].test if name in CATALOG else "test"


def _content(split: Split) -> tuple[np.ndarray, ...]:
    if isinstance(split.images, EncodedImages):
        return np.asarray(split.images.name), np.asarray(split.images.shape), split.ids
    assert split.labels is not None
    return split.images, split.labels


def _statistics(images: np.ndarray, levels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    mean, std = [], []
    for channel in np.moveaxis(images, -1, 0):
        counts = np.bincount(channel.reshape(-1), minlength=256) / channel.size  # exact, and no copy of the images
        values = np.arange(len(counts)) / levels
        mean.append(float(counts @ values))
        std.append(max(float(counts @ np.square(values - mean[-1])) ** 0.5, 1e-3))
    return tuple(round(v, 4) for v in mean), tuple(round(v, 4) for v in std)


def _split(images: np.ndarray | EncodedImages, labels: np.ndarray | None, levels: int = 255) -> Split:
    labels = None if labels is None else np.asarray(labels, np.int32)
    return Split(images, labels, np.arange(len(images), dtype=np.int32), levels)


def _digits() -> tuple[Split, Split]:
    """scikit-learn's 1,797 scanned digits, 8x8, 17 grey levels; test: every fifth image, from the first (360)."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images, labels = bunch.images.astype(np.uint8)[..., None], bunch.target
    is_test = np.arange(len(labels)) % 5 == 0
    levels = CATALOG["digits"].levels
    return _split(images[~is_test], labels[~is_test], levels), _split(images[is_test], labels[is_test], levels)
