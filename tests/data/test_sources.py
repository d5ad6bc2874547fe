import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base, digits
from rst_jax import config as config_lib
from rst_jax.data import Split, load_dataset
from rst_jax.data.pipeline import Images, augment, epoch_order, example_keys

CONFIG = config_lib.from_dict(digits.get_config())


def npz(tmp_path, **changes):
    rng = np.random.default_rng(0)
    arrays = {
        "x_train": rng.integers(0, 256, (50, 4, 4, 3), np.uint8),
        "y_train": np.arange(50) % 5,
        "x_test": rng.integers(0, 256, (10, 4, 4, 3), np.uint8),
        "y_test": np.arange(10) % 5,
    }
    arrays |= changes
    path = tmp_path / "data.npz"
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return dataclasses.replace(CONFIG, dataset="npz", data_path=str(path), holdout=10), arrays


def test_digits_are_split_as_written():
    data = load_dataset(CONFIG)
    assert (len(data.train), len(data.holdout), len(data.test)) == (1280, 157, 360)
    assert data.train.images.shape[1:] == (8, 8, 1)
    assert data.num_classes == 10
    assert data.test.scaled().max() == 1.0
    # the images themselves, by which a workdir knows them again
    assert data.digest == "b45ef4deac76a0281c6318d869c08781209b76ad3fe8c83710e9a1602310964e"
    assert (data.mean, data.std) == ((0.3053,), (0.3765,))
    every = np.concatenate([data.train.ids, data.holdout.ids])
    assert len(set(every)) == 1437
    # the held-out images are the same on every machine and in every version
    np.testing.assert_array_equal(data.holdout.ids[:8], [0, 21, 38, 43, 54, 66, 69, 85])


def test_a_batch_is_scaled_by_the_levels_of_its_split_with_labels_and_ids():
    images = np.asarray([0, 4, 16], np.uint8).reshape(3, 1, 1, 1)
    split = Split(images, np.asarray([2, 1, 0], np.int32), np.asarray([7, 9, 8], np.int32), levels=16)
    for index, rows in ((slice(None), [0, 1, 2]), (slice(1, 9), [1, 2]), (np.asarray([2, 0]), [2, 0])):
        found, labels, ids = split.batch(index)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found.ravel(), np.float32([0, 0.25, 1])[rows])
        np.testing.assert_array_equal(labels, split.labels[rows])
        np.testing.assert_array_equal(ids, split.ids[rows])
    part = split.take(np.asarray([2, 1]))
    assert (part.levels, len(part)) == (16, 2)
    np.testing.assert_array_equal(part.scaled(), split.scaled()[[2, 1]])
    in_bytes = dataclasses.replace(split, levels=255)
    np.testing.assert_array_equal(in_bytes.scaled(), images.astype(np.float32) / np.float32(255))


def test_npz_round_trip(tmp_path):
    config, arrays = npz(tmp_path)
    data = load_dataset(config)
    assert (len(data.train), len(data.holdout), len(data.test), data.num_classes) == (40, 10, 10, 5)
    for split in (data.train, data.holdout):
        np.testing.assert_array_equal(split.images, arrays["x_train"][split.ids])
        np.testing.assert_array_equal(split.labels, arrays["y_train"][split.ids])
    assert data.mean == pytest.approx((data.train.images / 255).mean((0, 1, 2)), abs=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x_train": np.zeros((50, 4, 4, 3))}, "x_train must be uint8"),
        ({"y_test": np.zeros((10, 1))}, "y_test must be integers"),
        ({"y_train": np.zeros(49, int)}, "50 images and 49 labels"),
        ({"x_test": None}, "x_test missing"),
    ],
)
def test_a_malformed_npz_is_named(tmp_path, change, words):
    config, _ = npz(tmp_path, **change)
    with pytest.raises(ValueError, match=words) as error:
        load_dataset(config)
    assert "data.npz" in str(error.value)


def test_a_missing_or_broken_npz_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"there is none at .*none\.npz"):
        load_dataset(dataclasses.replace(CONFIG, dataset="npz", data_path=str(tmp_path / "none.npz")))
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"not a zip")
    with pytest.raises(ValueError, match=r"broken\.npz"):
        load_dataset(dataclasses.replace(CONFIG, dataset="npz", data_path=str(broken)))


def test_more_held_out_than_there_is_is_refused():
    with pytest.raises(ValueError, match="smaller than the 1437"):
        load_dataset(dataclasses.replace(CONFIG, holdout=1437))


def test_an_unprepared_tfds_dataset_tells_the_command(tmp_path):
    config = dataclasses.replace(config_lib.from_dict(base.get_config()), data_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"not prepared.*\n.*pip install 'rst_jax\[prepare\]'.*download_and_prepare"):
        load_dataset(config)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_tfds_without_tensorflow(tmp_path):
    """A real TFDS dataset in array_record format, prepared and read here."""
    import tensorflow_datasets as tfds

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (30, 8, 8, 3), np.uint8)

    class Tiny(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = tmp_path

        def _info(self):
            image = tfds.features.Tensor(shape=(8, 8, 3), dtype=np.uint8)
            label = tfds.features.ClassLabel(names=["cat", "dog", "fox"])
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict({"image": image, "label": label}))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(range(20)), "test": self._generate_examples(range(20, 30))}

        def _generate_examples(self, rows):
            for i in rows:
                yield i, {"image": images[i], "label": i % 3}

    Tiny(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    data = load_dataset(dataclasses.replace(CONFIG, dataset="tiny", data_dir=str(tmp_path), holdout=5))
    assert "tensorflow" not in sys.modules
    assert data.class_names == ("cat", "dog", "fox")
    together = np.concatenate([data.train.images, data.holdout.images])
    assert {im.tobytes() for im in together} == {im.tobytes() for im in images[:20]}
    assert {im.tobytes() for im in data.test.images} == {im.tobytes() for im in images[20:]}


def test_epoch_order_is_a_permutation_that_changes_with_the_epoch():
    a, b = (np.asarray(epoch_order(jax.random.key(0), e, 100)) for e in (0, 1))
    assert sorted(a) == sorted(b) == list(range(100))
    assert (a != b).any()


def test_augmentation_crops_the_padded_image_and_follows_the_example():
    images = jnp.asarray(np.random.default_rng(0).uniform(0.1, 1, (64, 6, 6, 2)), jnp.float32)
    keys = example_keys(jax.random.key(0), jnp.arange(64))
    out = np.asarray(augment(keys, images, 2, True))
    np.testing.assert_array_equal(out[10:20], augment(keys[10:20], images[10:20], 2, True))
    padded = np.pad(np.asarray(images), ((0, 0), (2, 2), (2, 2), (0, 0)))
    seen = set()
    for image, source in zip(out, padded, strict=True):
        places = [
            (top, left, side)
            for top in range(5)
            for left in range(5)
            for side in (1, -1)
            if np.array_equal(source[top : top + 6, left : left + 6][:, ::side], image)
        ]
        assert len(places) == 1
        seen.add(places[0])
    assert {side for _, _, side in seen} == {1, -1}
    assert {top for top, _, _ in seen} == {left for _, left, _ in seen} == set(range(5))
    assert augment(keys, images, 0, False) is images


def test_images_on_the_device_are_scaled():
    data = Images.of(jnp.asarray([[[[16]]], [[[4]]]], jnp.uint8), jnp.asarray([1, 2]), jnp.asarray([7, 8]), levels=16)
    images, labels, ids = data.take(jnp.asarray([1, 0]))
    np.testing.assert_array_equal(images[:, 0, 0, 0], [0.25, 1.0])
    np.testing.assert_array_equal(labels, [2, 1])
    np.testing.assert_array_equal(ids, [8, 7])
