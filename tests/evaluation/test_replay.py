"""Images that a card kept, and images that are not those: a figure for the first alone."""

import shutil

import numpy as np
import pytest

import rst_jax
from rst_jax.runtime.files import read_arrays, write_arrays
from tests.evaluation.test_card import EPS, IMAGES, LABELS, N, network

ROW, L2 = "PGD-20 eps/4/linf", "CW-L2/l2"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replay") / "here"
    images, labels = np.concatenate([IMAGES] * 3), np.concatenate([LABELS] * 3)
    return rst_jax.evaluate(network, images, labels, EPS, "pgd-20", folder=folder, keep_images=True), folder


@pytest.fixture
def copy(made, tmp_path):
    for name in ("card.json", "adversarials.npz", "examples.npz"):
        shutil.copy(made[1] / name, tmp_path / name)
    return tmp_path


def change(folder, name, spoilt):
    path = folder / "adversarials.npz"
    arrays = read_arrays(path)
    arrays[name] = spoilt(arrays[name])
    write_arrays(path, {key: array for key, array in arrays.items() if array is not None})


def at(place, value):
    def changed(array):
        array = array.copy()
        array[place] = value
        return array

    return changed


def test_its_own_images_give_its_own_figures(made):
    card, folder = made
    own = rst_jax.replay(network, folder)
    assert own["clean"] == (card.record.clean.value, 3 * N)
    assert own[ROW] == (pytest.approx(card.record.rows[0].robust.value), 3 * N)
    assert list(own) == ["clean", ROW, "noise/linf"]


@pytest.mark.parametrize(
    ("name", "spoilt", "words"),
    [
        (ROW, lambda a: a + np.float32(0.01), "example 0 is not within eps 0.025 of the clean image"),
        (ROW, at((5, 0, 0, 0), 1.5), r"example 5 is not within .* and in \[0, 1\]"),
        (ROW, at((5, 0, 0, 0), np.nan), "example 5 is not within"),
        (ROW, at((70, 4, 4, 0), -np.inf), "example 70 is not within"),
        (ROW, lambda a: a[::-1].copy(), "example 0 is not within"),
        (ROW, lambda a: a[: N + 3], r"must be float32 \[72, 5, 5, 1\]; got float32 \[27, 5, 5, 1\]"),
        (ROW, lambda a: a[:, :3], r"got float32 \[72, 3, 5, 1\]"),
        (ROW, lambda a: np.moveaxis(a, -1, 1), "got float32"),
        (ROW, lambda a: a.astype(np.float64), "got float64"),
        (ROW, lambda a: (a * 255).astype(np.uint8), "got uint8"),
        (ROW, lambda a: None, "lacks 'PGD-20 eps/4/linf'"),
        (ROW, lambda a: np.concatenate([IMAGES] * 3), "is another; the card's was moved by 0.025"),
        ("noise/linf", lambda a: 1 - a, "noise/linf: that of example 0"),
        ("clean", lambda a: a + np.float32(0.001), "clean images, labels or ids are not those"),
        ("clean", at((3, 0, 0, 0), np.nan), r"images must lie in \[0, 1\]"),
        ("clean", at((3, 0, 0, 0), 2), r"images must lie in \[0, 1\]"),
        ("clean", lambda a: a[:-1], "clean must be float32"),
        ("clean", lambda a: None, "clean"),
        ("label", at(0, 3), "clean images, labels or ids are not those"),
        ("label", lambda a: a[::-1].copy(), "clean images, labels or ids are not those"),
        ("label", lambda a: a.astype(np.int64) + 2**32, "label must be int32"),
        ("label", lambda a: a[:-1], "label must be int32"),
        ("id", lambda a: a[::-1].copy(), "clean images, labels or ids are not those"),
        ("id", lambda a: None, "lacks 'id'"),
    ],
)
def test_other_images_than_the_cards_have_no_figure(copy, name, spoilt, words):
    change(copy, name, spoilt)
    with pytest.raises(ValueError, match=words) as error:
        rst_jax.replay(network, copy)
    assert "adversarials.npz" in str(error.value) or "images must lie in" in str(error.value)


def test_a_card_that_is_not_there_or_of_another_box_has_no_figure(copy):
    card = copy / "card.json"
    text = card.read_text()
    card.write_text(text.replace('"eps": 0.025', '"eps": 0.001'))
    with pytest.raises(ValueError, match=r"is not within eps 0\.001"):
        rst_jax.replay(network, copy)
    card.unlink()
    with pytest.raises(ValueError, match="there is no card"):
        rst_jax.replay(network, copy)


def test_rows_in_the_place_of_others_have_no_figure(copy):
    other = read_arrays(copy / "adversarials.npz")
    change(copy, ROW, lambda a: other["noise/linf"])
    change(copy, "noise/linf", lambda a: other[ROW])
    with pytest.raises(ValueError, match=r"PGD-20 eps/4/linf: that of example \d+ is another; the card's"):
        rst_jax.replay(network, copy)


def test_half_a_file_has_no_figure(copy):
    path = copy / "adversarials.npz"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="not a readable file of arrays"):
        rst_jax.replay(network, copy)


def test_a_classifier_of_fewer_classes_has_no_figure(made):
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 1\]"):
        rst_jax.replay(lambda x: network(x)[:, :2], made[1])


def test_images_of_the_l2_row_are_held_against_the_l2_ball(tmp_path):
    options = {"eps_l2": 0.4, "folder": tmp_path, "keep_images": True}
    card = rst_jax.evaluate(network, IMAGES[:8], LABELS[:8], EPS, ("fgsm", "cw-l2"), **options)
    assert rst_jax.replay(network, tmp_path)[L2] == (card.record.rows[1].robust.value, 8)
    arrays = read_arrays(tmp_path / "adversarials.npz")
    far = int(np.argmax(np.abs(arrays[L2] - arrays["clean"]).sum((1, 2, 3))))
    change(tmp_path, L2, lambda a: np.clip(a + 4 * (a - arrays["clean"]), 0, 1))
    with pytest.raises(ValueError, match=r"CW-L2/l2: that of example \d is not within eps 0\.4 .*l2"):
        rst_jax.replay(network, tmp_path)
    assert np.abs(arrays[L2] - arrays["clean"])[far].max() > 0
