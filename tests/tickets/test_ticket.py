from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rst_jax
from rst_jax import subnet
from rst_jax.models import ModelSpec
from rst_jax.tickets.file import load_ticket, save_ticket
from rst_jax.tickets.ticket import Ticket
from tests.drawing import IMAGES, SPEC, draw


@pytest.fixture(scope="module")
def drawn():
    return [draw(r)[0] for r in (0.1, 0.3)]


@pytest.mark.parametrize(("init", "pattern"), [("signed_kaiming_constant", "element"), ("kaiming_normal", "row")])
def test_a_ticket_file_round_trips_bit_by_bit(tmp_path, init, pattern):
    ticket, _ = draw(weight_init=init, pattern=pattern)
    path = tmp_path / "a.ticket"
    save_ticket(ticket, path)
    again = rst_jax.load_ticket(path)
    assert again.digest == ticket.digest
    assert (again.model, again.image_shape, again.origin) == (ticket.model, ticket.image_shape, ticket.origin)
    for a, b in zip(*(jax.tree.leaves((t.weights, t.masks, t.batch_stats)) for t in (ticket, again)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype
    np.testing.assert_array_equal(ticket(IMAGES), again(IMAGES))
    kept, total = again.weight_counts
    assert total == 152_768
    assert kept == sum(int((w != 0).sum()) for w in jax.tree.leaves(subnet.kernels(again.weights)))
    if init == "signed_kaiming_constant":
        assert path.stat().st_size < 60_000  # two bits a weight and a little
    assert [p.name for p in tmp_path.iterdir()] == ["a.ticket"]


def test_a_dense_network_is_a_ticket_without_masks(tmp_path):
    _, v = draw()
    dense = Ticket.make(SPEC, (8, 8, 1), 1.0, v["params"], {}, v["batch_stats"], "dense")
    save_ticket(dense, tmp_path / "d.ticket")
    again = load_ticket(tmp_path / "d.ticket")
    assert again.weight_counts == (152_768, 152_768)
    np.testing.assert_array_equal(dense(IMAGES), again(IMAGES))


def test_a_ticket_is_the_masked_module(drawn):
    ticket, v = draw()
    masks = subnet.masks(v["scores"], subnet.kept_counts(v["scores"], 0.1))
    variables = {"params": subnet.apply_masks(v["params"], masks), "batch_stats": ticket.batch_stats}
    module = ModelSpec("resnet_digits", 10, (0.3,), (0.4,)).make()
    np.testing.assert_allclose(
        ticket(IMAGES), module.apply(variables, jnp.asarray(IMAGES), train=False), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (IMAGES * 255, r"lie in \[0, 1\]"),
        ((IMAGES * 255).astype(np.uint8), "floats"),
        (IMAGES[..., 0], r"\[N, 8, 8, 1\]"),
        (IMAGES[:, :7], r"\[N, 8, 8, 1\]"),
        (np.full_like(IMAGES, np.nan), r"lie in \[0, 1\]"),
    ],
)
def test_wrong_images_are_refused(drawn, images, words):
    with pytest.raises(ValueError, match=words):
        drawn[0](images)


def test_a_broken_ticket_is_named_and_left_alone(tmp_path, drawn):
    path = tmp_path / "a.ticket"
    save_ticket(drawn[0], path)
    whole = path.read_bytes()
    for damage in (b"", whole[:1000], b"junk" * 100):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match=r"a\.ticket: not a readable file of arrays"):
            load_ticket(path)
        assert path.read_bytes() == damage
    with pytest.raises(ValueError, match="no such file"):
        load_ticket(tmp_path / "none.ticket")
    with np.load(Path(__file__).parents[1] / "golden" / "official_row.npz") as other:
        np.savez(path.with_suffix(".npz"), images=other["images"])
    with pytest.raises(ValueError, match="not a readable ticket"):
        load_ticket(path.with_suffix(".npz"))


def test_a_ticket_with_changed_content_is_damaged(tmp_path, drawn):
    path = tmp_path / "a.ticket"
    save_ticket(drawn[0], path)
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    arrays["stats/bn1/mean"] = arrays["stats/bn1/mean"] + 1
    with path.open("wb") as file:
        np.savez(file, **arrays)
    with pytest.raises(ValueError, match="damaged"):
        load_ticket(path)
