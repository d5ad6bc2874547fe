"""A TFDS data set of several shards, prepared and spoilt here; TensorFlow is not there."""

import dataclasses
import re
import shlex
import shutil
import sys

import numpy as np
import pytest

from configs import digits
from rst_jax import config as config_lib
from rst_jax.data import load_dataset, load_test
from rst_jax.data.prepared import Prepared

pytestmark = pytest.mark.filterwarnings("ignore")
CONFIG = config_lib.from_dict(digits.get_config())
IMAGES = np.random.default_rng(0).integers(0, 256, (60, 6, 6, 3), np.uint8)
TRAIN = "little-train.array_record-00001-of-00003"


@pytest.fixture(scope="module")
def builder(tmp_path_factory):
    """TFDS's builder of such a data set, as one of its own; it finds itself wherever TFDS looks for it."""
    import tensorflow_datasets as tfds

    class Little(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = tmp_path_factory.mktemp("package")
        splits, labels = ("train", "test"), staticmethod(lambda i: i % 3)

        def _info(self):
            image = tfds.features.Tensor(shape=(6, 6, 3), dtype=np.uint8)
            label = tfds.features.ClassLabel(names=["cat", "dog", "fox"])
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict({"image": image, "label": label}))

        def _split_generators(self, dl_manager):
            rows = {"train": range(40), "test": range(40, 60)}
            return {part: self._generate_examples(rows[part]) for part in self.splits}

        def _generate_examples(self, rows):
            for i in rows:
                yield i, {"image": IMAGES[i], "label": self.labels(i)}

    return Little


def prepare(builder, folder, form="array_record"):
    import tensorflow_datasets as tfds

    options = tfds.download.DownloadConfig(num_shards=3)
    builder(data_dir=folder, file_format=form).download_and_prepare(download_config=options)
    return folder


@pytest.fixture
def prepared(builder, tmp_path):
    return prepare(builder, tmp_path / "with a blank's")


def load(folder, name="little"):
    return load_dataset(dataclasses.replace(CONFIG, dataset=name, data_dir=str(folder), holdout=5))


def follow(advice, folder):
    """Do what a message says: delete what it names, and run its Python here instead of in a shell."""
    install, remove, python = (shlex.split(part) for part in advice.split(" && "))
    assert remove[:2] == ["rm", "-r"]
    assert remove[2].startswith(str(folder))
    assert install == ["pip", "install", "rst_jax[prepare]"]
    assert python[:2] == ["python", "-c"]
    shutil.rmtree(remove[2])
    exec(python[2], {})


def as_tfrecord(prepared):
    """The folder as TFDS leaves it by default, as far as anybody looks without TensorFlow."""
    version = prepared / "little" / "1.0.0"
    info = version / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    for path in version.glob("*.array_record-*"):
        path.rename(version / path.name.replace("array_record", "tfrecord"))


def test_every_image_comes_with_its_label(prepared):
    data = load(prepared)
    assert "tensorflow" not in sys.modules
    assert (len(data.train), len(data.holdout), len(data.test)) == (35, 5, 20)
    assert (data.num_classes, data.class_names) == (3, ("cat", "dog", "fox"))
    known = {image.tobytes(): i for i, image in enumerate(IMAGES)}
    for split in (data.train, data.holdout, data.test):
        rows = np.asarray([known[image.tobytes()] for image in split.images])
        np.testing.assert_array_equal(split.labels, rows % 3)


def spoil(kind):
    def spoilt(path):
        whole = path.read_bytes()
        at = len(whole) // 2
        made = {
            "missing": None,
            "empty": b"",
            "cut": whole[:at],
            "one byte short": whole[:-1],
            "flipped": whole[:3000] + bytes(byte ^ 255 for byte in whole[3000:3040]) + whole[3040:],
            "zeros": bytes(len(whole)),
        }[kind]
        path.unlink()
        if made is not None:
            path.write_bytes(made)

    return spoilt


@pytest.mark.parametrize("kind", ["missing", "empty", "cut", "one byte short", "flipped", "zeros"])
def test_a_shard_that_is_not_right_is_named_and_the_advice_mends_it(prepared, kind):
    spoil(kind)(prepared / "little" / "1.0.0" / TRAIN)
    with pytest.raises(ValueError, match=TRAIN) as error:
        load(prepared)
    sentence, advice = str(error.value).split("\n")
    assert sentence.endswith("Make it again with:")
    follow(advice.strip(), prepared)
    assert len(load(prepared).train) == 35


def test_a_damaged_shard_of_encoded_images_is_named(prepared):
    """Where images are decoded when they are asked for, it is found then, and not before."""
    spoil("flipped")(prepared / "little" / "1.0.0" / TRAIN)
    images = Prepared("little", prepared).encoded("train", 6)
    assert images.shape == (40, 6, 6, 3)
    with pytest.raises(ValueError, match=rf"{TRAIN}, example \d+: cannot be read \(RuntimeError: .*\n  pip .*rm -r "):
        images.labelled(np.arange(40))
    with pytest.raises(ValueError, match="example 0: not a readable image"):  # of the first shard, which is whole
        images.labelled(np.arange(2))


def test_tfds_own_format_tells_the_command_that_makes_the_other(prepared):
    as_tfrecord(prepared)
    with pytest.raises(
        ValueError, match="prepared as tfrecord, which only TensorFlow reads; expected array_rec"
    ) as error:
        load(prepared)
    follow(str(error.value).split("\n")[1].strip(), prepared)
    assert len(load(prepared).train) == 35


@pytest.mark.parametrize("left", ["nothing", "no info", "broken info"])
def test_a_folder_without_what_describes_it_is_named(prepared, left):
    version = prepared / "little" / "1.0.0"
    if left == "nothing":
        shutil.rmtree(version)
    elif left == "no info":
        (version / "dataset_info.json").unlink()
    else:
        (version / "dataset_info.json").write_text("{")
    with pytest.raises(ValueError, match=r"repare.*\n  .*download_and_prepare") as error:
        load(prepared)
    assert str(prepared) in str(error.value)


def test_a_test_split_alone_is_tested_on(builder, tmp_path, monkeypatch):
    monkeypatch.setattr(builder, "splits", ("test",))
    folder = prepare(builder, tmp_path)
    assert len(load_test("little", str(folder), "")) == 20
    assert len(load_test("little:1.0.0", str(folder), "", 5, skip=3)) == 5
    with pytest.raises(ValueError, match=r"no split train; there are test\. Without one it can be evaluated"):
        load(folder)


def test_a_train_split_alone_is_named(builder, tmp_path, monkeypatch):
    monkeypatch.setattr(builder, "splits", ("train",))
    with pytest.raises(ValueError, match="no split test; there are train"):
        load_test("little", str(prepare(builder, tmp_path)), "")


def test_images_without_a_label_are_named(builder, tmp_path, monkeypatch):
    """TFDS's sign for a label that nobody gave."""
    monkeypatch.setattr(builder, "labels", staticmethod(lambda i: -1 if i == 47 else i % 3))
    folder = prepare(builder, tmp_path)
    with pytest.raises(ValueError, match=r"labels of split test must lie in \[0, 2\] .* got -1 for image"):
        load_test("little", str(folder), "")
    images = Prepared("little", folder).encoded("test", 6)
    with pytest.raises(ValueError, match=r"split test of 20 images: labels must lie in \[0, 2\] .* got -1 for image"):
        images.labelled(slice(None))


@pytest.mark.parametrize("name", ["/etc", "../x", "", ".", "a b", "cifar10/../..", "c\x1b[2J", "cifar10?", "x" * 5000])
def test_what_is_no_name_is_a_sentence(tmp_path, name):
    with pytest.raises(ValueError) as error:
        load(tmp_path, name)
    if len(name) < 100:
        assert "dataset must be digits, npz or a TFDS name" in str(error.value)


def test_a_misspelt_name_names_the_nearest(tmp_path):
    with pytest.raises(ValueError, match=re.escape("Did you mean 'cifar10'? Prepare it once with:")):
        load(tmp_path, "cifar01")
