"""Tickets from anybody: a file's digest covers all that it says, and what it holds fits the network that it names."""

import dataclasses
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest

from rst_jax import subnet
from rst_jax.initializers import init_variables
from rst_jax.models import ModelSpec
from rst_jax.tickets.file import load_ticket, save_ticket
from rst_jax.tickets.store import TicketStore, restore_tickets, save_tickets
from rst_jax.tickets.ticket import Origin, Ticket

ZOO = next((Path(__file__).parents[2] / "zoo").glob("*-0.3-*.ticket"))
SPEC = ModelSpec("resnet_digits", 3, (0.3,), (0.4,), width=0.05)


@pytest.fixture(scope="module")
def drawn():
    v = init_variables(SPEC.make(), (8, 8, 1), jax.random.key(0))
    masks = subnet.masks(v["scores"], subnet.kept_counts(v["scores"], 0.5))
    origin = Origin("ratio-0.5", "digits", 1, "element", "signed_kaiming_constant", 3, "holdout", 0.5, 0.25)
    return Ticket.make(SPEC, (8, 8, 1), 0.5, v["params"], masks, v["batch_stats"], origin=origin), v


@pytest.fixture
def path(drawn, tmp_path):
    save_ticket(drawn[0], tmp_path / "a.ticket")
    return tmp_path / "a.ticket"


def edit(path, change):
    """A file whose arrays and told values were changed by hand."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    told = json.loads(arrays["meta"].tobytes())
    change(told, arrays)
    arrays["meta"] = np.frombuffer(json.dumps(told).encode(), np.uint8)
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)


def fields(value, prefix=()):
    """The places of all plain values."""
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return [place for key, inner in pairs for place in fields(inner, (*prefix, key))]
    return [prefix]


def told_of(path):
    with np.load(path) as file:
        return json.loads(file["meta"].tobytes())


def put(told, place, value):
    *folders, last = place
    for folder in folders:
        told = told[folder]
    told[last] = value


def test_a_digest_covers_every_value_that_a_file_tells(path, drawn):
    """Of each one a value of the same kind that is another; the digest is the only thing that it does not cover."""
    whole, before = path.read_bytes(), told_of(path)
    others = {"kind": "finetuned", "name": "ratio-0.7", "selected_on": "test"}
    for place in fields(before):
        if place[-1] in ("digest", "format"):
            continue
        old = before
        for key in place:
            old = old[key]
        other = others.get(place[-1], f"{old}x") if isinstance(old, str) else old + type(old)(1) / 4
        other = int(old + 1) if isinstance(old, int) else other
        path.write_bytes(whole)
        edit(path, lambda told, _, place=place, other=other: put(told, place, other))
        with pytest.raises(ValueError, match=r"a\.ticket: "):
            load_ticket(path)
    path.write_bytes(whole)
    assert load_ticket(path).digest == drawn[0].digest


@pytest.mark.parametrize(
    "changes",
    [
        {"model": ModelSpec("resnet_digits", 3, (0.9,), (0.4,), width=0.05)},
        {"model": ModelSpec("resnet_digits", 3, (0.3,), (0.5,), width=0.05)},
        {"model": ModelSpec("resnet_digits", 3, (0.3,), (0.4,), width=0.05, stem_stride=1)},
        {"image_shape": (9, 9, 1)},
        {"remaining_ratio": 0.4},
        {"kind": "finetuned"},
        {"origin": Origin("another")},
    ],
)
def test_what_decides_the_logits_is_in_the_digest(drawn, changes):
    assert dataclasses.replace(drawn[0], **changes).digest != drawn[0].digest


def test_masks_are_in_the_digest(drawn):
    ticket, _ = drawn
    fuller = jax.tree.map(np.ones_like, ticket.masks)
    assert dataclasses.replace(ticket, masks=fuller).digest != ticket.digest


def test_numbers_of_numpy_are_numbers(drawn):
    spec = ModelSpec("resnet_digits", np.int64(3), np.asarray([0.3]), [np.float64(0.4)], width=np.float64(0.05))
    assert spec == SPEC
    assert dataclasses.replace(drawn[0], model=spec).digest == drawn[0].digest


def test_a_ticket_of_an_earlier_version_keeps_its_digest_wherever_it_goes(tmp_path):
    old = load_ticket(ZOO)
    save_ticket(old, tmp_path / "a.ticket")
    again = load_ticket(tmp_path / "a.ticket")
    assert again.digest == old.digest == told_of(ZOO)["digest"]
    assert (again.format, told_of(tmp_path / "a.ticket")["format"]) == (1, 1)
    edit(tmp_path / "a.ticket", lambda told, _: told.update(format=2))
    with pytest.raises(ValueError, match="damaged"):
        load_ticket(tmp_path / "a.ticket")


def model(**changes):
    return lambda told, arrays: told["model"].update(changes)


def meta(**changes):
    return lambda told, arrays: told.update(changes)


def array(**changes):
    return lambda told, arrays: arrays.update({name.replace("__", "/"): value for name, value in changes.items()})


KERNEL = "conv1/kernel"
UNFIT = {
    "other classes": (model(num_classes=4), "mask of fc/kernel"),
    "no classes": (model(num_classes=0), "num_classes"),
    "another width": (model(width=0.1), "mask"),
    "endless width": (model(width=1e300), "cannot hold its network"),
    "huge width": (model(width=1e5), "cannot hold its network"),
    "no width": (model(width=0), "no network .*width must be positive"),
    "endless blocks": (model(blocks=[10**9, 1]), "no network .* more layers than the file"),
    "blocks of another kind": (model(blocks="many"), "blocks: Expected `array`"),
    "an unknown argument": (model(depht=3), "takes no argument 'depht'"),
    "an unknown network": (model(name=["resnet"]), "model must be one of"),
    "no mean": (model(mean=[]), "mean and std"),
    "means of three channels": (model(mean=[0.1, 0.2, 0.3], std=[1, 1, 1]), "mean and std are of 3 channels"),
    "a deviation of none": (model(std=[0.0]), "std above 0"),
    "images of none": (meta(image_shape=[0, 8, 1]), "image_shape"),
    "images of two axes": (meta(image_shape=[8, 8]), "image_shape"),
    "images of three channels": (meta(image_shape=[8, 8, 3]), "mask of conv1|conv1/kernel: expected"),
    "a ratio of two": (meta(remaining_ratio=2), "remaining_ratio"),
    "a kind of none": (meta(kind="golden"), "kind"),
    "dense with masks": (meta(kind="dense"), "no place for the mask"),
    "another format": (meta(format=3), "format"),
    "no digest": (meta(digest=""), "damaged"),
    "a name that leaves its folder": (meta(meta={"name": "../../x"}), "plain word"),
    "a seed that is none": (meta(meta={"seed": "0"}), "seed"),
    "one array more": (array(more=np.zeros(3)), "holds .* arrays; expected"),
    "a weight more": (array(**{"weight/x/kernel": np.zeros(3, np.float32)}), "no place for the weight of x/kernel"),
    "a mask as numbers": (array(**{f"mask/{KERNEL}": np.zeros(4, np.int64)}), "mask of conv1/kernel: expected bytes"),
    "a short mask": (array(**{f"mask/{KERNEL}": np.zeros(1, np.uint8)}), "mask of conv1/kernel: expected bytes"),
    "a mask of no pattern": (array(**{f"mask_shape/{KERNEL}": np.int32([1, 3, 1, 3])}), "mask of conv1/kernel is of"),
    "a mask of another type": (array(**{f"mask_shape/{KERNEL}": np.float32([1, 3, 1, 3])}), "the shape of conv1"),
    "another kernel": (array(**{f"shape/{KERNEL}": np.int32([1, 1, 1, 3])}), "conv1/kernel: expected"),
    "few weights": (array(**{f"weight/{KERNEL}": np.zeros(2, np.float32)}), "conv1/kernel: expected floats"),
    "text for weights": (array(**{f"weight/{KERNEL}": np.asarray("x")}), "conv1/kernel: expected floats"),
    "a variance below 0": (array(**{"stats/bn1/var": -np.ones(3, np.float32)}), "variance below 0"),
    "a statistic that is not finite": (array(**{"stats/bn1/mean": np.full(3, np.nan, np.float32)}), "not finite"),
    "a text that is too long": (meta(meta={"dataset": "x" * 70_000}), "'meta' is uint8"),
}


@pytest.mark.parametrize(("change", "words"), UNFIT.values(), ids=UNFIT)
def test_what_does_not_fit_is_refused_in_a_sentence_when_it_is_loaded(path, change, words):
    edit(path, change)
    with pytest.raises(ValueError, match=rf"a\.ticket: .*({words})") as error:
        load_ticket(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("kind", "masks"), [("dense", True), ("scratch", False)])
def test_what_would_not_be_read_is_not_written(drawn, tmp_path, kind, masks):
    ticket = dataclasses.replace(drawn[0], kind=kind, masks=drawn[0].masks if masks else {})
    with pytest.raises(ValueError, match=f"a ticket of kind '{kind}' has"):
        save_ticket(ticket, tmp_path / "b.ticket")
    assert not (tmp_path / "b.ticket").exists()


@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "", ".", "a/b", "a\x1b[0m"])
def test_no_ticket_has_a_name_that_leaves_its_folder(name, drawn):
    with pytest.raises(ValueError, match="a ticket's name must be a plain word"):
        Origin(name)


@pytest.fixture
def checkpoint(drawn, tmp_path):
    ticket, v = drawn
    other = dataclasses.replace(ticket, kind="finetuned", origin=Origin("other"))
    save_tickets(tmp_path / "checkpoints" / "tickets", v["params"], [ticket, other])
    assert TicketStore(tmp_path).in_checkpoint() == {t.name: t.digest for t in (ticket, other)}
    return tmp_path / "checkpoints" / "tickets"


TOLD = {
    "another ratio": (lambda about: about["tickets"]["other"].update(remaining_ratio=0.9), "damaged"),
    "another mean": (lambda about: about["model"].update(mean=[0.9]), "damaged"),
    "another name": (lambda about: about["tickets"]["other"]["meta"].update(name="x"), "calls itself 'x'"),
    "a name that leaves its folder": (
        lambda about: about["tickets"].update({"../x": about["tickets"].pop("other")}),
        "array of tickets/../x",
    ),
    "a ticket less": (lambda about: about["tickets"].pop("other"), "no place for the array of tickets/other"),
    "other classes": (lambda about: about["model"].update(num_classes=7), "the mask of fc/kernel"),
    "a huge network": (lambda about: about["model"].update(width=1e5), "cannot hold"),
    "masks of no pattern": (lambda about: about["mask_shapes"]["conv1"].update(kernel=[1, 3, 1, 3]), "the mask of"),
    "masks that are none": (lambda about: about["mask_shapes"]["conv1"].update(kernel="x"), "Expected `array`"),
    "no tickets": (lambda about: about.pop("tickets"), "missing required field `tickets`"),
}


@pytest.mark.parametrize(("change", "words"), TOLD.values(), ids=TOLD)
def test_a_checkpoint_of_tickets_is_what_it_says(checkpoint, change, words):
    told = checkpoint / "about" / "metadata"
    about = json.loads(told.read_text())
    change(about)
    told.write_text(json.dumps(about))
    with pytest.raises(ValueError, match=rf"cannot be read \(.*{words}") as error:
        restore_tickets(checkpoint)
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:.*never awaited", "ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's
def test_a_flipped_bit_in_a_checkpoint_of_tickets_is_found(checkpoint):
    """Wherever the bulk of its data lies."""
    digests = TicketStore(checkpoint.parents[1]).in_checkpoint()
    file = max((p for p in checkpoint.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    whole, found = file.read_bytes(), 0
    for place in np.linspace(0, len(whole) - 1, 40, dtype=int):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        now = TicketStore(checkpoint.parents[1]).in_checkpoint()
        assert now in ({}, digests)
        found += now == {}
    assert found >= 20


def test_a_pipe_in_a_checkpoint_is_not_waited_for(checkpoint):
    os.mkfifo(checkpoint / "tickets" / "d" / "pipe")
    with pytest.raises(ValueError, match="pipe is no ordinary file"):
        restore_tickets(checkpoint)


def test_a_checkpoint_of_an_earlier_version_keeps_its_digests(tmp_path):
    old = load_ticket(ZOO)
    save_tickets(tmp_path / "tickets", old.weights, [old])
    assert restore_tickets(tmp_path / "tickets")[0].digest == old.digest
