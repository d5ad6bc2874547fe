"""Images decoded when they are asked for: crops, batches ahead, and a small ImageNet in array_record format."""

import contextlib
import dataclasses
import io
import itertools
import sys
import threading

import jax
import numpy as np
import pytest
from PIL import Image

from configs import digits
from rst_jax import config as config_lib
from rst_jax.data import EncodedImages, Split, load_dataset, load_test, prefetched
from rst_jax.data.catalog import CATALOG
from rst_jax.data.stream import _random_box, centre_crop, random_resized_crop
from rst_jax.evaluation.accuracy import Evaluator
from rst_jax.initializers import init_variables
from rst_jax.models.resnet import ResNet
from rst_jax.runtime.mesh import make_mesh

KEY = np.asarray([3, 4], np.uint32)
SIZES = [(60, 45), (45, 60), (33, 33), (200, 41), (500, 375), (40, 170)]
BILINEAR = Image.Resampling.BILINEAR


def smooth(rng, width, height):
    few = Image.fromarray(rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), np.uint8))
    return few.resize((width, height), Image.Resampling.BICUBIC)


def file(image, form="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def opened(encoded):
    return Image.open(io.BytesIO(encoded))


RNG = np.random.default_rng(0)
FILES = [file(smooth(RNG, *SIZES[i % len(SIZES)]), quality=90) for i in range(32)]


def labels_of(ids):
    return np.asarray(ids) * 7 % 5


def encoded(files=FILES, size=32):
    def read(ids):
        return [(files[i], int(labels_of(i))) for i in ids]

    return EncodedImages("some/1.0.0, split train", read, np.arange(len(files)), size)


def difference(a, b):
    return np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max()


def test_encoded_images_are_indexed_like_an_array_of_centre_crops():
    images = encoded()
    whole = images[:]
    assert whole.shape == images.shape == (32, 32, 32, 3)
    assert whole.dtype == images.dtype == np.uint8
    assert len(images) == 32
    np.testing.assert_array_equal(images[5:9], whole[5:9])
    np.testing.assert_array_equal(images[np.asarray([7, 1, 7])], whole[[7, 1, 7]])
    assert images[:0].shape == (0, 32, 32, 3)
    some = images.take(np.asarray([9, 2, 30]))
    np.testing.assert_array_equal(some[1:], whole[[2, 30]])
    np.testing.assert_array_equal(some.take(np.asarray([2])).ids, [30])
    for index in (slice(1, 3), np.asarray([2, 0])):
        found, labels = some.labelled(index)
        np.testing.assert_array_equal(found, some[index])
        np.testing.assert_array_equal(labels, labels_of(some.ids[index]))
        assert labels.dtype == np.int32
    with pytest.raises(TypeError, match="slice or an array"):
        images[3]
    # 500 x 375: the shorter side to 256/224 of 224, the longer one in proportion, the middle of it
    resized = opened(FILES[4]).resize((int(256 * 500 / 375), 256), BILINEAR)
    np.testing.assert_array_equal(encoded(size=224)[4:5][0], np.asarray(resized)[16:240, 58:282])


def test_a_large_jpeg_decoded_at_a_part_of_its_size_is_nearly_the_same():
    big = file(smooth(RNG, 640, 480).resize((1600, 1200), Image.Resampling.LANCZOS), quality=92)
    resized = opened(big).resize((int(64 * 1600 / 1200), 64), BILINEAR)
    assert difference(centre_crop(big, 56), np.asarray(resized)[4:60, 14:70]) <= 8
    for seed in range(20):
        left, top, wide, high = _random_box(1600, 1200, np.random.default_rng(seed))
        part = opened(big).resize((56, 56), BILINEAR, (left, top, left + wide, top + high))
        assert np.abs(random_resized_crop(big, 56, np.random.default_rng(seed)).astype(int) - part).mean() < 2


def test_a_random_crop_is_the_part_resized():
    for seed in range(20):
        left, top, wide, high = _random_box(500, 375, np.random.default_rng(seed))
        found = random_resized_crop(FILES[4], 200, np.random.default_rng(seed))
        part = opened(FILES[4]).crop((left, top, left + wide, top + high)).resize((200, 200), BILINEAR)
        assert difference(found[3:-3, 3:-3], np.asarray(part)[3:-3, 3:-3]) <= 1  # the edges know what is beside them


def test_other_colours_become_rgb_and_the_orientation_in_the_file_is_ignored():
    rgb = smooth(RNG, 64, 48)
    grey = centre_crop(file(rgb.convert("L")), 28)
    assert difference(grey[..., :1], grey) == 0
    cmyk = centre_crop(file(rgb.convert("CMYK"), quality=95), 28)
    assert difference(cmyk, centre_crop(file(rgb, quality=95), 28)) < 30
    assert centre_crop(file(rgb.convert("P"), "PNG"), 28).shape == (28, 28, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    np.testing.assert_array_equal(centre_crop(file(rgb, exif=exif), 28), centre_crop(file(rgb), 28))


def test_a_random_crop_has_the_area_and_the_shape_that_were_asked_for():
    boxes = np.asarray([_random_box(500, 375, np.random.default_rng(seed)) for seed in range(2000)])
    left, top, wide, high = boxes.T
    assert (np.stack([left, top]) >= 0).all()
    assert (left + wide <= 500).all()
    assert (top + high <= 375).all()
    area, ratio = wide * high / (500 * 375), wide / high
    assert 0.079 < area.min() < 0.09
    assert area.max() > 0.95
    assert 0.74 < ratio.min() < 0.76
    assert 1.31 < ratio.max() < 1.35
    assert len(np.unique(boxes, axis=0)) > 1900
    square = np.asarray([_random_box(400, 400, np.random.default_rng(seed)) for seed in range(2000)])
    assert abs(np.log(square[:, 2] / square[:, 3]).mean()) < 0.02  # log-uniform around 1
    assert _random_box(1000, 10, np.random.default_rng(0)) == (493, 0, 13, 10)  # nothing fits: the centre
    assert _random_box(10, 1000, np.random.default_rng(0)) == (0, 493, 10, 13)


def test_a_training_crop_follows_from_key_epoch_and_id_alone():
    images = encoded()
    whole, labels = images.crops(np.arange(32), KEY, 2)
    np.testing.assert_array_equal(labels, labels_of(np.arange(32)))
    assert whole.shape == (32, 32, 32, 3)
    assert whole.dtype == np.uint8
    for part, index in ((images, [20, 3]), (images.take(np.asarray([8, 3])), [1])):
        again, labels = part.crops(np.asarray(index), KEY, 2)
        np.testing.assert_array_equal(again, whole[part.ids[index]])
        np.testing.assert_array_equal(labels, labels_of(part.ids[index]))
    for other, _ in (images.crops(np.arange(32), KEY, 3), images.crops(np.arange(32), KEY[::-1], 2)):
        assert all(difference(a, b) > 0 for a, b in zip(whole, other, strict=True))
    # the same on every machine and in every version
    stream = np.random.Generator(np.random.Philox(key=[3, 4], counter=[0, 0, 2, 4]))
    left, top, wide, high = _random_box(500, 375, stream)
    assert (left, top, wide, high) == (156, 101, 279, 230)
    part = opened(FILES[4]).resize((96, 96), BILINEAR, (left, top, left + wide, top + high))
    np.testing.assert_array_equal(encoded(size=96).crops(np.asarray([4]), KEY, 2)[0][0], part)


@pytest.mark.parametrize("broken", [b"", b"not an image", FILES[4][:4000], FILES[4][:30]])
def test_a_broken_image_is_named(broken):
    images = encoded([*FILES[:6], broken]).take(np.asarray([1, 6, 2]))
    assert images[::2].shape[0] == 2
    for decode in (lambda: images[:], lambda: images.crops(np.arange(3), KEY, 0)):
        with pytest.raises(ValueError, match=r"some/1\.0\.0, split train, example 6: not a readable image"):
            decode()


def test_records_that_cannot_be_read_are_named():
    def read(ids):
        raise RuntimeError("bad chunk")

    images = EncodedImages("some/1.0.0, split train", read, np.arange(9), 32)
    with pytest.raises(ValueError, match=r"split train, examples 2 to 5: cannot be read \(RuntimeError: bad chunk\)"):
        images[2:6]


def threads():
    return {t for t in threading.enumerate() if t.name.startswith("prefetch")}


def test_batches_come_in_order_from_one_thread_that_ends():
    made = []

    def batches():
        for i in range(7):
            made.append(threading.current_thread().name)
            yield i

    assert list(prefetched(batches(), 3)) == list(range(7))
    assert len(set(made)) == 1
    assert made[0].startswith("prefetch")
    assert list(prefetched([], 2)) == []
    assert not threads()


def test_no_more_than_depth_batches_are_made_ahead():
    made = threading.Semaphore(0)
    count = itertools.count()

    def batches():
        for i in count:
            made.release()
            yield i

    with contextlib.closing(prefetched(batches(), 2)) as ahead:
        assert next(ahead) == 0
        for _ in range(3):
            assert made.acquire(timeout=60)
        assert len(threads()) == 1
    assert next(count) == 3  # one handed on, two ahead, and no more
    assert not threads()


def test_an_exception_comes_where_its_batch_would_have_come():
    def batches():
        yield 1
        yield 2
        raise ValueError("example 17")

    ahead = prefetched(batches(), 4)
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(ValueError, match="example 17"):
        next(ahead)
    assert not threads()


def test_a_consumer_that_stops_early_leaves_no_thread():
    def consume():
        for batch in prefetched(itertools.count(), 2):
            if batch == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        consume()
    ahead = prefetched(itertools.count(), 2)
    assert next(ahead) == 0
    del ahead
    assert not threads()


TINY = dataclasses.replace(config_lib.from_dict(digits.get_config()), dataset="imagenet2012", holdout=5, crop_padding=0)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A TFDS imagenet2012 of 24 and 8 images and three classes in array_record format, written without TensorFlow."""
    import tensorflow_datasets as tfds

    folder = tmp_path_factory.mktemp("tfds")

    class Imagenet2012(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("5.1.0")
        pkg_dir_path = folder

        def _info(self):
            features = {
                "image": tfds.features.Image(encoding_format="jpeg"),
                "label": tfds.features.ClassLabel(names=["cat", "dog", "fox"]),
                "file_name": tfds.features.Text(),
            }
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(range(24)), "validation": self._generate_examples(range(24, 32))}

        def _generate_examples(self, rows):
            for i in rows:
                yield i, {"image": FILES[i], "label": i % 3, "file_name": f"{i}.JPEG"}

    Imagenet2012(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(CATALOG, "imagenet2012", dataclasses.replace(CATALOG["imagenet2012"], streamed=32))


@pytest.mark.filterwarnings("ignore")
def test_imagenet_is_read_from_tfds_without_decoding(prepared, small):
    config = dataclasses.replace(TINY, data_dir=str(prepared))
    data = load_dataset(config)
    assert "tensorflow" not in sys.modules
    assert (len(data.train), len(data.holdout), len(data.test)) == (19, 5, 8)
    assert (data.test.levels, data.mean[0], data.std[2], data.class_names) == (255, 0.485, 0.225, ("cat", "dog", "fox"))
    order = np.argsort(np.random.Philox(key=0).random_raw(24), kind="stable")
    np.testing.assert_array_equal(data.holdout.ids, np.sort(order[:5]))
    # every image with its label, whatever the order in which TFDS keeps them
    known = {centre_crop(f, 32).tobytes(): i for i, f in enumerate(FILES)}
    seen = []
    for split in (data.train, data.holdout, data.test):
        assert isinstance(split.images, EncodedImages)
        assert split.labels is None
        rows = [known[image.tobytes()] for image in split.images[:]]
        images, labels, ids = split.batch()
        np.testing.assert_array_equal(images, split.scaled())
        np.testing.assert_array_equal(labels, np.asarray(rows) % 3)
        np.testing.assert_array_equal(ids, split.ids)
        _, labels = split.images.crops(np.arange(len(split)), KEY, 0)
        np.testing.assert_array_equal(labels, np.asarray(rows) % 3)
        np.testing.assert_array_equal(split.images.ids, split.ids)
        seen += rows
    assert sorted(seen) == list(range(32))
    few = data.test.take(np.asarray([3, 1]))
    assert isinstance(few.images, EncodedImages)
    np.testing.assert_array_equal(few.scaled(), data.test.scaled()[[3, 1]])
    assert few.scaled().dtype == np.float32
    assert few.scaled().max() <= 1
    for a, b in zip(load_test("imagenet2012", str(prepared), "", 3).batch(), data.test.batch(slice(3)), strict=True):
        np.testing.assert_array_equal(a, b)
    # other ids or another size, another digest
    digests = [data.digest, load_dataset(config).digest]
    assert len(set(digests)) == 1
    digests.append(load_dataset(dataclasses.replace(config, holdout=6)).digest)
    digests.append(load_dataset(dataclasses.replace(config, train_examples=4)).digest)
    assert len(set(digests)) == 3


@pytest.mark.filterwarnings("ignore")
def test_no_record_is_read_before_it_is_asked_for_and_nothing_is_written_beside_them(prepared, small, monkeypatch):
    from tensorflow_datasets.core.data_sources.array_record import ArrayRecordDataSource as Source

    there, read = sorted(prepared.rglob("*")), Source.__getitems__
    places = []
    monkeypatch.setattr(Source, "__getitems__", lambda self, keys: places.extend(keys) or read(self, keys))
    data = load_dataset(dataclasses.replace(TINY, data_dir=str(prepared)))
    assert data.digest
    assert data.test.take(np.arange(3)).labels is None
    assert not places
    assert data.test.batch(np.asarray([5, 2]))[1].shape == (2,)
    assert places == [5, 2]
    assert sorted(prepared.rglob("*")) == there


@pytest.mark.filterwarnings("ignore")
def test_a_split_that_is_missing_tells_which_are_there(prepared, monkeypatch):
    monkeypatch.setitem(CATALOG, "imagenet2012", dataclasses.replace(CATALOG["imagenet2012"], test="absent"))
    config = dataclasses.replace(TINY, data_dir=str(prepared))
    with pytest.raises(ValueError, match="there is no split absent; there are train, validation"):
        load_dataset(config)


@pytest.mark.filterwarnings("ignore")
def test_streamed_images_are_judged_as_if_they_were_in_memory(prepared, small):
    config = dataclasses.replace(TINY, data_dir=str(prepared))
    config = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, steps=2, batch_size=5))
    data = load_dataset(config)
    images, labels = data.test.images.labelled(slice(None))
    memory = Split(images, labels, data.test.ids)
    model = ResNet(num_classes=3, mean=data.mean, std=data.std, blocks=(1,), widths=(4,), stem_stride=2)
    v = init_variables(model, (32, 32, 3), jax.random.key(1))
    variables = {name: v[name] for name in ("params", "batch_stats")}
    evaluator = Evaluator(model, config, make_mesh(), KEY)
    streamed = list(evaluator.judged(variables, [variables, variables], data.test))
    assert [len(batch.natural) for batch in streamed] == [8]  # 5 on 4 devices are 8
    for a, b in zip(streamed, evaluator.judged(variables, [variables, variables], memory), strict=True):
        np.testing.assert_array_equal(a.adversarial, b.adversarial)
        np.testing.assert_array_equal(a.natural, b.natural)
        np.testing.assert_array_equal(a.robust, b.robust)
    assert evaluator.accuracies(variables, data.test) == evaluator.accuracies(variables, memory)
    assert not threads()
