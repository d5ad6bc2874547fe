"""Somebody's .npz and .npy files: of both splits, of one, and CIFAR-10-C's."""

import dataclasses
import shutil

import numpy as np
import pytest

from configs import digits
from rst_jax import config as config_lib
from rst_jax.data import load_dataset, load_test
from rst_jax.runtime.files import read_arrays

CONFIG = config_lib.from_dict(digits.get_config())
RNG = np.random.default_rng(0)
ARRAYS = {
    "x_train": RNG.integers(0, 256, (50, 5, 5, 3), np.uint8),
    "y_train": np.arange(50) % 5,
    "x_test": RNG.integers(0, 256, (10, 5, 5, 3), np.uint8),
    "y_test": np.arange(10) % 5,
}


def save(folder, **changes):
    path = folder / "data.npz"
    np.savez(path, **{name: array for name, array in (ARRAYS | changes).items() if array is not None})
    return path


def load(path):
    return load_dataset(dataclasses.replace(CONFIG, dataset="npz", data_path=str(path), holdout=10))


def first(images):
    return np.moveaxis(images, -1, 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"y_train": ARRAYS["y_train"] + 1}, "data.npz: y_train name 5 classes from 1 to 5, .*add num_classes"),
        ({"y_train": np.where(np.arange(50) == 7, 255, ARRAYS["y_train"])}, "from 0 to 255, and none is 5"),
        ({"y_train": np.where(np.arange(50) == 7, 2_000_000_000, ARRAYS["y_train"])}, "got 2000000000 for image 7"),
        ({"y_train": ARRAYS["y_train"] + 2**32}, "y_train must lie in .* got 4294967296 for image 0"),
        ({"y_test": ARRAYS["y_test"] + 2**31}, "y_test must lie in .* got 2147483648"),
        ({"y_test": ARRAYS["y_test"] + 1}, r"y_test must lie in \[0, 4\] .* got 5 for image 4"),
        ({"y_test": ARRAYS["y_test"] - 1}, "got -1"),
        ({"y_train": np.zeros(50, int), "y_test": np.zeros(10, int)}, "at least two classes"),
        ({"x_train": first(ARRAYS["x_train"])}, "x_train must be .*channels first"),
        ({"x_train": first(ARRAYS["x_train"]), "x_test": first(ARRAYS["x_test"])}, "channels first"),
        ({"x_test": np.zeros((10, 6, 6, 3), np.uint8)}, "must have one shape"),
        ({"num_classes": np.asarray(1)}, r"num_classes must be an integer in \[2, "),
        ({"num_classes": np.asarray(3)}, r"y_train must lie in \[0, 2\]"),
        ({"num_classes": np.asarray(2_000_000_000)}, "num_classes must be an integer in"),
        ({"num_classes": np.asarray(5.5)}, "num_classes must be an integer in"),
        ({"num_classes": np.asarray([5, 6])}, "num_classes must be an integer in"),
    ],
)
def test_what_cannot_be_trained_on_is_named_with_the_file(tmp_path, change, words):
    with pytest.raises(ValueError, match=words) as error:
        load(save(tmp_path, **change))
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_classes_without_an_example_may_be_said(tmp_path):
    data = load(save(tmp_path, y_train=ARRAYS["y_train"] + 1, num_classes=np.asarray(7)))
    assert (data.num_classes, data.class_names) == (7, tuple("0123456"))
    assert set(np.unique(data.train.labels)) == {1, 2, 3, 4, 5}


def test_whole_floats_and_wide_integers_are_labels(tmp_path):
    data = load(save(tmp_path, y_train=ARRAYS["y_train"].astype(np.float32), y_test=ARRAYS["y_test"].astype("uint64")))
    assert data.digest == load(save(tmp_path)).digest
    assert data.train.labels.dtype == data.test.labels.dtype == np.int32


def test_a_file_of_test_images_alone_is_tested_on_and_not_trained_on(tmp_path):
    path = save(tmp_path, x_train=None, y_train=None)
    split = load_test("npz", "", str(path))
    np.testing.assert_array_equal(split.images, ARRAYS["x_test"])
    np.testing.assert_array_equal(split.labels, ARRAYS["y_test"])
    with pytest.raises(ValueError, match="x_train, y_train missing"):
        load(path)
    with pytest.raises(ValueError, match="channels first"):
        load_test("npz", "", str(save(tmp_path, x_test=first(ARRAYS["x_test"]))))


@pytest.mark.parametrize("label", [0, 3])
def test_one_class_alone_is_not_tested_on_unless_there_are_more(tmp_path, label):
    y_test = np.full(10, label)
    path = save(tmp_path, y_test=y_test)
    with pytest.raises(ValueError, match=f"every label is {label}, and what always says so is never wrong"):
        load_test("npz", "", str(path))
    assert len(load_test("npz", "", str(save(tmp_path, y_test=y_test, num_classes=np.asarray(5))))) == 10
    assert len(load_test("npz", "", str(save(tmp_path, y_test=y_test[:1], x_test=ARRAYS["x_test"][:1])))) == 1


def test_corrupted_images_and_their_labels_in_two_files_are_tested_on(tmp_path):
    """As CIFAR-10-C: five severities in one array, the labels of each the same."""
    np.save(tmp_path / "fog.npy", ARRAYS["x_train"])
    np.save(tmp_path / "labels.npy", ARRAYS["y_train"].astype(np.uint8))
    whole = load_test("npz", "", str(tmp_path / "fog.npy"))
    np.testing.assert_array_equal(whole.images, ARRAYS["x_train"])
    np.testing.assert_array_equal(whole.labels, ARRAYS["y_train"])
    fourth = load_test("npz", "", str(tmp_path / "fog.npy"), 10, skip=30)
    np.testing.assert_array_equal(fourth.ids, np.arange(30, 40))
    images, labels, _ = fourth.batch()
    np.testing.assert_array_equal(images, ARRAYS["x_train"][30:40].astype(np.float32) / np.float32(255))
    np.testing.assert_array_equal(labels, ARRAYS["y_train"][30:40])
    assert len(load_test("npz", "", str(tmp_path / "fog.npy"), skip=45)) == 5
    with pytest.raises(ValueError, match="50 test images; expected to skip fewer, got 50"):
        load_test("npz", "", str(tmp_path / "fog.npy"), skip=50)


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (ARRAYS["x_train"], None, "expected an .npy file of images, uint8 .*, with labels.npy beside it"),
        (ARRAYS["x_train"], ARRAYS["y_train"][:-1], "fog.npy has 50 images and 49 labels"),
        (ARRAYS["x_train"], ARRAYS["y_train"] + 2**32, r"labels\.npy must lie in"),
        (ARRAYS["x_train"], np.zeros(50, np.uint8), "every label is 0"),
        (ARRAYS["x_train"].astype(np.float32), ARRAYS["y_train"], "fog.npy must be uint8"),
        (first(ARRAYS["x_train"]), ARRAYS["y_train"], "fog.npy must be .*channels first"),
        (ARRAYS["y_train"], ARRAYS["y_train"], "fog.npy must be uint8"),
        (b"", ARRAYS["y_train"], "fog.npy: not a readable file of an array"),
        (b"\x93NUMPY\x01\x00", ARRAYS["y_train"], "fog.npy: not a readable file of an array"),
        (np.asarray([{}], object), ARRAYS["y_train"], "fog.npy: not a readable file of an array"),
    ],
)
def test_npy_files_that_are_not_right_are_named(tmp_path, images, labels, words):
    path = tmp_path / "fog.npy"
    if isinstance(images, bytes):
        path.write_bytes(images)
    else:
        np.save(path, images)
    if labels is not None:
        np.save(tmp_path / "labels.npy", labels)
    with pytest.raises(ValueError, match=words):
        load_test("npz", "", str(path))


def test_an_npy_file_that_claims_more_than_it_holds_takes_no_memory(tmp_path):
    header = {"descr": "|u1", "fortran_order": False, "shape": (10**9, 32, 32, 3)}
    with (tmp_path / "fog.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
    np.save(tmp_path / "labels.npy", ARRAYS["y_train"])
    with pytest.raises(ValueError, match=r"fog\.npy: not a readable file of an array"):
        load_test("npz", "", str(tmp_path / "fog.npy"))


def test_one_array_where_several_are_expected_is_a_sentence(tmp_path):
    np.save(tmp_path / "fog.npy", ARRAYS["x_train"])
    shutil.copy(tmp_path / "fog.npy", tmp_path / "named.npz")
    for name in ("fog.npy", "named.npz"):
        with pytest.raises(ValueError, match=r"one array, as an \.npy file"):
            read_arrays(tmp_path / name)
    with pytest.raises(ValueError, match=r"fog\.npy: expected an \.npz file of x_train"):
        load(tmp_path / "fog.npy")
    with pytest.raises(ValueError, match=r"named\.npz: .*it is one array"):
        load(tmp_path / "named.npz")
