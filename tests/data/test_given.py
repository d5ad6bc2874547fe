"""The one door of labels and images: what comes through it, and the sentence for everything else."""

import numpy as np
import pytest

from rst_jax.data.given import MOST_CLASSES, channels_first, check_shape, count_classes, whole_labels


@pytest.mark.parametrize(
    "kind", [np.int8, np.uint8, np.int16, np.int32, np.int64, np.uint64, ">i4", np.float16, np.float32, np.float64]
)
def test_whole_numbers_of_any_type_are_labels(kind):
    found = whole_labels(np.asarray([0, 3, 126], kind), "labels", 3)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, [0, 3, 126])


def test_labels_that_are_right_are_not_copied():
    """Those of images that are read later are filled in where they lie."""
    labels = np.zeros(3, np.int32)
    assert whole_labels(labels, "labels", 3) is labels


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.asarray([0, 2**32 + 3]), r"in \[0, 9\] .*got 4294967299 for image 1\."),
        (np.asarray([2**31, 0]), "got 2147483648 for image 0"),
        (np.asarray([2**63 + 1, 0], np.uint64), "got 9223372036854775809"),
        (np.asarray([0, -1]), "got -1 for image 1"),
        (np.asarray([-128, 1], np.int8), "got -128"),
        (np.asarray([0, 10], np.uint8), "got 10"),
        (np.asarray([0, np.nan]), "got nan"),
        (np.asarray([0, np.inf], np.float16), "got inf"),
        (np.asarray([0.5, 0], np.float32), r"whole numbers; got 0\.5"),
        (np.asarray([0, 3.0000001]), "whole numbers; got 3.0000001"),
        (np.asarray([True, False]), "must be integers.*got bool"),
        (np.asarray([1, 2], complex), "must be integers.*complex"),
        (np.asarray(["1", "2"]), "must be integers"),
        (np.asarray([2**70, 1], object), "must be integers.*object"),
        (np.asarray([[1], [2]]), r"one an image; got int64 \[2, 1\]\. Take labels\.reshape\(-1\)"),
        (np.eye(10)[:2], r"Take np\.argmax\(labels, -1\)"),
        (np.asarray(3), r"got int64 \[\]"),
        (np.asarray([1, 2, 3]), r"integers \[2\].*got int64 \[3\]"),
    ],
)
def test_what_is_no_label_is_named(labels, words):
    with pytest.raises(ValueError, match=words) as error:
        whole_labels(labels, "labels", 2, 10)
    assert "\n" not in str(error.value)


def test_a_label_is_named_by_its_own_place():
    with pytest.raises(ValueError, match="got 7 for image 31"):
        whole_labels(np.asarray([1, 7]), "labels", 2, 5, np.asarray([4, 31]))


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.arange(1, 11), "name 10 classes from 1 to 10, and none is 0: .*from 0, each with an example"),
        (np.asarray([*range(10), 255]), "name 11 classes from 0 to 255, and none is 10"),
        (np.asarray([0, MOST_CLASSES - 1]), "and none is 1"),
        (np.zeros(9, np.int32), "at least two classes; got 1"),
    ],
)
def test_classes_without_examples_are_named_unless_they_are_said(labels, words):
    with pytest.raises(ValueError, match=words):
        count_classes(labels, "labels")
    assert count_classes(labels, "labels", MOST_CLASSES) == MOST_CLASSES


def test_as_many_classes_as_labels_name():
    assert count_classes(np.asarray([2, 0, 1, 1]), "labels") == 3


@pytest.mark.parametrize("shape", [(9, 3, 32, 32), (9, 1, 28, 28), (9, 3, 24, 32), (9, 2, 5, 5), (9, 13, 64, 64)])
def test_channels_first_is_named_with_what_turns_it(shape):
    assert channels_first(shape)
    with pytest.raises(ValueError, match=r"channels first; put them last with np\.transpose\(images, \(0, 2, 3, 1\)\)"):
        check_shape(shape, "images")


@pytest.mark.parametrize(
    "shape", [(9, 32, 32, 3), (9, 28, 28, 1), (9, 8, 8, 4), (9, 4, 4, 3), (9, 1, 1, 25), (9, 24, 32, 5), (1, 3, 3, 3)]
)
def test_channels_last_are_images(shape):
    check_shape(shape, "images")


@pytest.mark.parametrize("shape", [(9, 32, 32), (9,), (), (0, 8, 8, 1), (9, 8, 0, 1), (9, 8, 8, 0), (1, 9, 8, 8, 1)])
def test_what_is_no_batch_of_images_is_named(shape):
    with pytest.raises(ValueError, match=r"images must be \[n, H, W, C\], at least one; got \["):
        check_shape(shape, "images")
