"""What images and labels must be, wherever they come from: checked as they are, before anything is made of them."""

import numpy as np

MOST_CLASSES = 2**20
_COLOURS = 4  # channels that an image has at most, where it has few


def channels_first(shape: tuple[int, ...]) -> bool:
    """Whether images of this shape, [N, A, B, C], are [N, C, H, W]: the last axis is long, and the first is not."""
    _, first, second, last = shape
    return last > _COLOURS and (first <= _COLOURS < second or first < second == last)


def check_shape(shape: tuple[int, ...], name: str) -> None:
    """Refuse what is not [N, H, W, C], with at least one image and one value in each.

    Raises:
      ValueError: says what was expected, what it was, and how it is turned into that.
    """
    hint = ""
    if len(shape) == 3:
        hint = f" Images without a channel axis are given one with {name}[..., None]."
    elif len(shape) == 4 and channels_first(shape):
        hint = f" These have their channels first; put them last with np.transpose({name}, (0, 2, 3, 1))."
    if len(shape) != 4 or not np.prod(shape, dtype=object) or hint:
        raise ValueError(f"{name} must be [n, H, W, C], at least one; got {list(shape)}.{hint}")


def whole_labels(
    labels: np.ndarray, name: str, n: int, classes: int = MOST_CLASSES, places: np.ndarray | None = None
) -> np.ndarray:
    """Labels as int32 [n]; integers of any size, or floats that are whole, are looked at before they are made that.

    Args:
      labels: as they came.
      name: of them, in messages.
      n: images that they belong to.
      classes: a label is below this.
      places: of the labels, where these are not 0 to n - 1, int [n].

    Raises:
      ValueError: another shape or type, or a label that is not one of 0 to classes - 1; the first such is named.
    """
    if labels.shape != (n,) or labels.dtype.kind not in "iuf":
        hint = ""
        if labels.ndim == 2 and len(labels) == n:
            hint = f" Take {name}.reshape(-1)." if labels.shape[1] == 1 else f" Take np.argmax({name}, -1)."
        raise ValueError(f"{name} must be integers [{n}], one an image; got {labels.dtype} {list(labels.shape)}.{hint}")
    seen = labels.astype(np.float64) if labels.dtype.kind == "f" else labels
    right = (seen >= 0) & (seen < classes) & (seen == np.floor(seen))  # of no NaN
    if not right.all():
        first = int(np.argmin(right))
        raise ValueError(
            f"{name} must lie in [0, {classes - 1}] and be whole numbers; got {labels[first]} for image "
            f"{first if places is None else places[first]}."
        )
    return labels.astype(np.int32, copy=False)


def count_classes(labels: np.ndarray, name: str, said: int | None = None, hint: str = "") -> int:
    """How many classes the training labels name: all from 0 on, or as many as are said.

    Args:
      labels: int32 [N], of all images.
      name: of them, in messages.
      said: where it is known; then a class may be without examples.
      hint: how it can be said.

    Raises:
      ValueError: one class alone, or classes of which no image is an example.
    """
    there = np.unique(labels)
    classes = int(there[-1]) + 1 if said is None else said
    if said is None and len(there) < classes:
        lacking = int(np.flatnonzero(there != np.arange(len(there)))[0])
        raise ValueError(
            f"{name} name {len(there)} classes from {there[0]} to {there[-1]}, and none is {lacking}: classes are "
            f"numbered from 0, each with an example.{hint}"
        )
    if classes < 2:
        raise ValueError(f"{name} must name at least two classes; got {classes}, of which every image is right.")
    return classes
