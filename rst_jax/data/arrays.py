"""Images and labels from somebody's NumPy files: an .npz of both splits or of one, or CIFAR-10-C's two .npy files."""

from pathlib import Path

import numpy as np

from rst_jax.data.given import MOST_CLASSES, check_shape, count_classes, whole_labels
from rst_jax.runtime.files import read_arrays

Examples = tuple[np.ndarray, np.ndarray]  # uint8 [N, H, W, C] and int32 [N]
_BESIDE = "labels.npy"


def both_splits(path: Path) -> tuple[Examples, Examples, int]:
    """Training and test examples of an .npz file, and how many classes there are.

    As many as the training labels name, or the file's `num_classes`, an integer.

    Raises:
      ValueError: what the file lacks, or what is not right with it; it is named.
    """
    if path.suffix == ".npy":
        raise ValueError(
            f"{path}: expected an .npz file of x_train, y_train, x_test, y_test; an .npy file is one array."
        )
    found = _arrays(path)
    train, test = (_examples(path, found, part) for part in ("train", "test"))
    if train[0].shape[1:] != test[0].shape[1:]:
        shapes = " and ".join(str(images.shape[1:]) for images, _ in (train, test))
        raise ValueError(f"{path}: training and test images must have one shape; got {shapes}.")
    said = _said(path, found)
    hint = " Number them so, or add num_classes to the file."
    classes = count_classes(train[1], f"{path}: y_train", said, hint)
    for part, (_, labels) in (("train", train), ("test", test)):
        whole_labels(labels, f"{path}: y_{part}", len(labels), classes)
    return train, test, classes


def test_split(path: Path) -> Examples:
    """The test examples of an .npz file, which need not hold others; or of an .npy file of images, as CIFAR-10-C's.

    The labels of the latter are in labels.npy, beside it.

    Raises:
      ValueError: what is missing, or what is not right; the file is named.
    """
    if path.suffix != ".npy":
        found = _arrays(path)
        images, labels = _examples(path, found, "test")
        several = _said(path, found) is not None
    elif path.name == _BESIDE or not (path.parent / _BESIDE).is_file():
        raise ValueError(f"{path}: expected an .npy file of images, uint8 [N, H, W, C], with {_BESIDE} beside it.")
    else:
        beside, several = path.parent / _BESIDE, False
        images, labels = _checked(_array(path), _array(beside), str(path), str(beside))
    if not several and labels.min() == labels.max() and len(labels) > 1:
        raise ValueError(
            f"{path}: every label is {labels[0]}, and what always says so is never wrong; expected two at least, "
            "or num_classes in an .npz file."
        )
    return images, labels


def _arrays(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise ValueError(f"config: data_path must name an .npz file; there is none at {path}.")
    return read_arrays(path)


def _array(path: Path) -> np.ndarray:
    """The array of an .npy file, read as it is looked at."""
    if not path.is_file():
        raise ValueError(f"config: data_path must name an .npz or .npy file; there is none at {path}.")
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # of a dozen kinds
        raise ValueError(f"{path}: not a readable file of an array ({' '.join(str(error).split())}).") from error


def _examples(path: Path, found: dict[str, np.ndarray], part: str) -> Examples:
    if missing := [name for name in (f"x_{part}", f"y_{part}") if name not in found]:
        raise ValueError(
            f"{path}: expected x_train, y_train, x_test, y_test (the last two where there is nothing to train); "
            f"{', '.join(missing)} missing."
        )
    return _checked(found[f"x_{part}"], found[f"y_{part}"], f"{path}: x_{part}", f"{path}: y_{part}")


def _checked(images: np.ndarray, labels: np.ndarray, of_images: str, of_labels: str) -> Examples:
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(f"{of_images} must be uint8 [N, H, W, C]; got {images.dtype} {images.shape}.")
    check_shape(images.shape, of_images)
    if labels.ndim == 1 and len(labels) != len(images):
        raise ValueError(f"{of_images} has {len(images)} images and {len(labels)} labels; expected as many.")
    return images, whole_labels(labels, of_labels, len(images))


def _said(path: Path, found: dict[str, np.ndarray]) -> int | None:
    """The file's `num_classes`."""
    if "num_classes" not in found:
        return None
    said = found["num_classes"]
    if said.dtype.kind not in "iu" or said.size != 1 or not 2 <= said.item() <= MOST_CLASSES:
        raise ValueError(f"{path}: num_classes must be an integer in [2, {MOST_CLASSES}]; got {said.tolist()!r:.50}.")
    return int(said.item())
