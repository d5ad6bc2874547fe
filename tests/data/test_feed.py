"""Which batches come when: epochs, dispatches, the short batch, resume, and batches decoded on the way."""

import threading

import jax
import numpy as np
import pytest

from rst_jax.data import EncodedImages, Split
from rst_jax.data.feed import Feed, batch_sizes
from rst_jax.data.pipeline import epoch_order
from rst_jax.runtime.mesh import make_mesh
from tests.data.test_stream import FILES, encoded, labels_of, threads

KEYS = {"order": np.asarray([1, 2], np.uint32), "step": np.asarray([3, 4], np.uint32)}


def mesh(devices):
    return make_mesh(jax.devices()[:devices])


def split(n):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 17, (n, 2, 2, 1), np.uint8)
    return Split(images, np.arange(n, dtype=np.int32) % 5, 100 + np.arange(n, dtype=np.int32), levels=16)


def order(epoch, n):
    return np.asarray(epoch_order(jax.random.wrap_key_data(KEYS["order"]), epoch, n))


def taken(dispatches):
    """The places of the split that each step of the dispatches takes, and how many steps each dispatch has."""
    places, counts = [], []
    for d in dispatches:
        counts.append(d.steps)
        for i in range(d.steps):
            places.append(np.asarray(d.order)[d.first + i * d.rows :][: d.rows])
    return places, counts


@pytest.mark.parametrize(
    ("n", "batch", "devices", "tail", "sizes"),
    [
        (40, 8, 4, None, [8] * 5),
        (43, 8, 1, None, [8] * 5 + [3]),
        (43, 8, 2, None, [8] * 5 + [2]),
        (43, 8, 4, None, [8] * 5),
        (43, 8, 1, 2, [8] * 5 + [2]),
        (43, 8, 1, 0, [8] * 5),
        (5, 8, 4, None, [4]),
    ],
)
def test_an_epoch_is_whole_batches_and_what_the_devices_can_share(n, batch, devices, tail, sizes):
    assert batch_sizes(n, batch, devices, tail) == sizes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((40, 6, 4), "batch_size must be a multiple of the 4 devices; got 6"),
        ((43, 8, 2, 3), "has 3 images, which 2 devices cannot share"),
        ((3, 8, 4), "3 training images do not make a batch on 4 devices"),
    ],
)
def test_batches_that_cannot_be_shared_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        batch_sizes(*arguments)


def test_every_epoch_takes_every_image_once_in_its_own_order():
    feed = Feed(split(43), 8, mesh(1), KEYS)
    assert (feed.batches, feed.tail, feed.left_out, feed.streamed) == ([8] * 5 + [3], 3, 0, False)
    places, counts = taken(feed.dispatches(0, 12))
    assert counts == [1] * 12
    for epoch in range(2):
        np.testing.assert_array_equal(np.concatenate(places[6 * epoch : 6 * epoch + 6]), order(epoch, 43))
    assert (order(0, 43) != order(1, 43)).any()


@pytest.mark.parametrize("steps", [2, 64])
def test_a_dispatch_of_many_steps_ends_at_logs_and_epochs_and_takes_the_same_images(steps):
    one = Feed(split(43), 8, mesh(1), KEYS, log_every_steps=4)
    many = Feed(split(43), 8, mesh(1), KEYS, steps_per_dispatch=steps, log_every_steps=4)
    places, counts = taken(many.dispatches(0, 12))
    # an epoch: 5 whole batches and the short one, alone; a log after 4 and 8 steps
    assert counts == {2: [2, 2, 1, 1, 2, 2, 1, 1], 64: [4, 1, 1, 2, 3, 1]}[steps]
    for a, b in zip(places, taken(one.dispatches(0, 12))[0], strict=True):
        np.testing.assert_array_equal(a, b)


def test_going_on_in_the_middle_of_an_epoch_takes_what_was_to_come():
    feed = Feed(split(43), 8, mesh(1), KEYS)
    whole, _ = taken(feed.dispatches(0, 18))
    for step in (1, 5, 6, 8):
        rest, _ = taken(feed.dispatches(step, 18))
        for a, b in zip(rest, whole[step:], strict=True):
            np.testing.assert_array_equal(a, b)
    assert list(feed.dispatches(18, 18)) == []


def test_a_run_goes_on_with_the_short_batch_that_it_began_with():
    began = Feed(split(43), 8, mesh(2), KEYS)
    assert (began.tail, began.left_out) == (2, 1)
    now = Feed(split(43), 8, mesh(1), KEYS)
    assert now.tail == 3
    now.keep_tail(began.tail)
    assert (now.tail, now.batches, now.left_out) == (2, began.batches, 1)
    for a, b in zip(taken(began.dispatches(3, 18))[0], taken(now.dispatches(3, 18))[0], strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="4 devices cannot share"):
        Feed(split(43), 8, mesh(4), KEYS).keep_tail(began.tail)


def test_images_in_memory_are_on_every_device_with_their_labels_ids_and_levels():
    of = split(43)
    data = next(Feed(of, 8, mesh(4), KEYS).dispatches(0, 1)).data
    assert data.pixels.sharding.is_fully_replicated
    assert len(data.pixels.sharding.device_set) == 4
    for a, b in ((data.pixels.reshape(of.images.shape), of.images), (data.labels, of.labels), (data.ids, of.ids)):
        np.testing.assert_array_equal(a, b)
    assert data.levels == 16


@pytest.mark.parametrize("devices", [1, 4])
def test_a_streamed_batch_is_its_crops_with_their_labels_split_over_the_devices(devices):
    """20 of 32 images, in batches of 8 and 4: each place of the order with the crop, label and id of its image."""
    images = encoded().take(np.arange(31, 11, -1))
    of = Split(images, None, images.ids)
    feed = Feed(of, 8, mesh(devices), KEYS, steps_per_dispatch=64)
    assert (feed.streamed, feed.steps_per_dispatch, feed.batches) == (True, 1, [8, 8, 4])
    found = list(feed.dispatches(1, 5))
    assert [(d.steps, d.rows, d.first, len(d.order)) for d in found] == [(1, rows, 0, 0) for rows in (8, 4, 8, 8)]
    for d, (epoch, first) in zip(found, [(0, 8), (0, 16), (1, 0), (1, 8)], strict=True):
        index = order(epoch, 20)[first : first + d.rows]
        crops, labels = images.crops(index, KEYS["step"], epoch)
        np.testing.assert_array_equal(d.data.pixels.reshape(crops.shape), crops)
        assert d.data.shape == crops.shape[1:]
        np.testing.assert_array_equal(d.data.labels, labels)
        np.testing.assert_array_equal(d.data.labels, labels_of(31 - index))
        np.testing.assert_array_equal(d.data.ids, 31 - index)
        assert (d.data.pixels.dtype, d.data.labels.dtype, d.data.ids.dtype) == (np.uint8, np.int32, np.int32)
        assert len(d.data.pixels.sharding.device_set) == devices
        assert d.data.pixels.addressable_shards[0].data.shape[0] == d.rows // devices
    assert not threads()


def test_a_record_is_read_once_a_batch_and_none_before():
    read = []

    def records(places):
        read.extend(places)
        return [(FILES[i], i) for i in places]

    of = Split(EncodedImages("some", records, np.arange(24, dtype=np.int32), 16), None, np.arange(24, dtype=np.int32))
    feed = Feed(of, 8, mesh(4), KEYS)
    assert not read
    list(feed.dispatches(0, 3))
    assert sorted(read) == list(range(24))


def test_a_feed_that_is_closed_early_leaves_no_thread_and_a_broken_image_is_named():
    images = encoded([*FILES[:31], b"no image"])
    feed = Feed(Split(images, None, images.ids), 8, mesh(2), KEYS)
    ahead = feed.dispatches(0, 100)
    next(ahead)
    assert threads()
    ahead.close()
    assert not threads()
    with pytest.raises(ValueError, match="example 31: not a readable image"):
        list(feed.dispatches(0, 4))
    assert threading.active_count() < 100
