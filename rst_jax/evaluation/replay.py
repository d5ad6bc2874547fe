"""Transfer: another classifier on the adversarial images that a card has kept, each of them checked again."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from rst_jax.data.given import whole_labels
from rst_jax.evaluation.classifier import Classifier, LogitsFn, of_function
from rst_jax.evaluation.programs import Programs, make_programs, violations
from rst_jax.evaluation.question import check_images
from rst_jax.losses import correct
from rst_jax.records import CardRecord
from rst_jax.reports.card import load_card
from rst_jax.runtime.files import Pieces, arrays_in_pieces, digest, read_arrays
from rst_jax.runtime.paths import local_path
from rst_jax.threat import ThreatModel

_AT_ONCE = 250  # images


def replay(logits_fn: LogitsFn, folder: str | Path) -> dict[str, tuple[float, int]]:
    """Accuracy of another classifier on the images of a card, and how many these are.

    Of each cascade its adversarial images (and the clean ones that it did not break), and of "clean" the clean ones.

    Raises:
      ValueError: the card kept no images, the classifier takes others, or they are not the card's: other clean images
        or labels than it was made with, or adversarial ones that are not in its ball and box or were moved otherwise.
    """
    path = local_path(folder) / "adversarials.npz"
    if not path.exists():
        raise ValueError(f"{path}: there are no adversarial images; evaluate with keep_images (--keep_images).")
    card = load_card(path.parent)
    with arrays_in_pieces(path, _AT_ONCE) as arrays:
        _check_header(path, card, arrays)
        labels, ids = (np.concatenate(list(arrays[name])) for name in ("label", "id"))
    with arrays_in_pieces(path, 2) as arrays:
        classifier = of_function(logits_fn, next(iter(arrays["clean"])))
    programs, right = make_programs(classifier, _AT_ONCE), dict[str, tuple[float, int]]()
    with arrays_in_pieces(path, _AT_ONCE) as arrays:
        right["clean"] = _clean(path, card, programs, classifier, arrays["clean"], labels, ids)
    told = read_arrays(path.parent / "examples.npz")
    for row in card.rows:
        name, threat = f"{row.name}/{row.norm}", ThreatModel(row.eps, row.norm, *card.box)
        moved = told.get(f"{row.name}/distance", np.zeros(0))
        if moved.shape != (row.robust.n,) or moved.dtype.kind != "f":
            raise ValueError(f"{path.parent / 'examples.npz'}: it lacks how far {row.name} moved each image.")
        with arrays_in_pieces(path, _AT_ONCE) as arrays:
            pieces = _inside(f"{path}: {name}", threat, arrays[name], arrays["clean"], moved, ids)
            said = [programs.logits(classifier, images, card.n) for images in pieces]
        right[name] = float(correct(np.concatenate(said), labels[: row.robust.n]).mean()), row.robust.n
    return right


def _check_header(path: Path, card: CardRecord, arrays: Mapping[str, Pieces]) -> None:
    """Whether all arrays are there, as many and of the shape and type that the card says."""
    shape = arrays["clean"].shape[1:] if "clean" in arrays else ()
    expected = {"label": (card.n,), "id": (card.n,), "clean": (card.n, *shape)}
    expected |= {f"{row.name}/{row.norm}": (row.robust.n, *shape) for row in card.rows}
    for name, wanted in expected.items():
        kind = np.dtype(np.int32 if name in ("label", "id") else np.float32)
        if name not in arrays:
            raise ValueError(f"{path}: it lacks {name!r}, which the card has.")
        if (found := arrays[name]).shape != wanted or found.dtype != kind or not math.prod(wanted):
            raise ValueError(f"{path}: {name} must be {kind} {list(wanted)}; got {found.dtype} {list(found.shape)}.")


def _clean(
    path: Path,
    card: CardRecord,
    programs: Programs,
    classifier: Classifier,
    clean: Pieces,
    labels: np.ndarray,
    ids: np.ndarray,
) -> tuple[float, int]:
    """Accuracy on the clean images, if these, their labels and ids are those of the card."""
    box, said = ThreatModel(0.0, "linf", *card.box), list[np.ndarray]()

    def read() -> Iterator[np.ndarray]:
        for images in clean:
            check_images(images, box)
            said.append(programs.logits(classifier, images, card.n))
            yield images

    found = digest({"images": Pieces(clean.shape, clean.dtype, read()), "labels": labels, "ids": ids})
    if found != card.images_digest:
        raise ValueError(f"{path}: clean images, labels or ids are not those that the card was made with.")
    logits = np.concatenate(said)
    return float(correct(logits, whole_labels(labels, "labels", card.n, logits.shape[-1])).mean()), card.n


def _inside(
    name: str, threat: ThreatModel, found: Pieces, clean: Pieces, moved: np.ndarray, ids: np.ndarray
) -> Iterator[np.ndarray]:
    """Adversarial images, piece by piece: none has left ball or box, and each was moved as far as the card says."""
    first = 0
    for images, whole in zip(found, clean, strict=False):  # of the first examples alone, perhaps
        rows, last = whole[: len(images)], first + len(images)
        outside = violations(threat, images, rows)
        if outside.any():
            where = f"eps {threat.eps:g} of the clean image ({threat.norm}) and in [{threat.lower:g}, {threat.upper:g}]"
            raise ValueError(f"{name}: that of example {ids[first + int(np.argmax(outside))]} is not within {where}.")
        far = threat.distance(images.astype(np.float64), rows.astype(np.float64))
        others = ~np.isclose(far, moved[first:last], rtol=1e-4, atol=1e-7)
        if others.any():
            place = first + int(np.argmax(others))
            told = f"the card's was moved by {moved[place]:g}"
            raise ValueError(f"{name}: that of example {ids[place]} is another; {told} ({threat.norm}).")
        first = last
        yield images
