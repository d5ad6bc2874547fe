import dataclasses
import json

import numpy as np
import pytest

from rst_jax import records
from rst_jax.runtime import files


def test_wilson_interval_by_hand():
    a = records.accuracy(np.array([True] * 8 + [False] * 2))
    assert (a.value, a.n) == (0.8, 10)
    assert a.low == pytest.approx(0.4902, abs=1e-4)
    assert a.high == pytest.approx(0.9433, abs=1e-4)
    assert records.accuracy(np.ones(5, bool)).high == pytest.approx(1.0)
    for n in range(1, 400):
        assert records.accuracy(np.ones(n, bool)).high == 1.0
        assert records.accuracy(np.zeros(n, bool)).low == 0.0
    with pytest.raises(ValueError, match="at least one"):
        records.accuracy(np.array([]))


def test_a_record_round_trips(tmp_path):
    attack = records.AttackRecord("PGD-20", "linf", 0.1, 20, 0.01, 1, 0)
    record = records.TransferRecord(["a"], [0.1], [0.9], [[0.5]], 10, attack, ["x"], records.provenance())
    files.write_json(tmp_path / "deep" / "r.json", record)
    assert records.read_json(tmp_path / "deep" / "r.json", records.TransferRecord) == record
    assert json.loads((tmp_path / "deep" / "r.json").read_text())["attack"]["eps"] == 0.1
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["r.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"names": []}'])
def test_a_broken_record_is_named(tmp_path, text):
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"r\.json: expected a R2SRecord"):
        records.read_json(path, records.R2SRecord)


def test_provenance_says_what_a_reader_needs():
    p = records.provenance()
    assert "cpu" in p.hardware
    assert {"jax", "flax", "optax"} <= set(p.libraries)
    assert all(dataclasses.asdict(p).values())


def test_digest_sees_values_names_types_and_shapes():
    x = np.arange(4.0)
    different = [{"a": x}, {"b": x}, {"a": x.astype(np.float32)}, {"a": x.reshape(2, 2)}, {"a": x + 1e-9}]
    assert len({records.digest(t) for t in different}) == 5
    assert records.digest({"a": x}) == records.digest({"a": np.asfortranarray(x)})


def changed(value, change):
    """Plain values with one of them changed: at the end of a path."""
    (*folders, last), new = change
    here = value
    for folder in folders:
        here = here[folder]
    here[last] = new
    return value


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ((("clean", "value"), 47.0), "<= 1"),
        ((("clean", "n"), -5), ">= 0"),
        ((("rows", 0, "norm"), "l1"), "l1"),
        ((("rows", 0, "broken", "FGSM"), "many"), "Expected `int`"),
        ((("rows", 0, "over_passes", "robust"), []), "entries; expected as many"),
        ((("sweep", "eps"), [0.0]), "entries; expected as many"),
        ((("verdict",), "trustworthy"), "its checks say suspect, its verdict 'trustworthy'"),
        ((("box",), [1.0, 0.0]), "its box is"),
        ((("box",), [1.0]), "length >= 2"),
        ((("checks",), {}), "Expected `array`"),
        ((("provenance",), None), "Expected `object`"),
    ],
)
def test_a_card_says_what_a_card_can_say(tmp_path, change, words):
    attack = records.CascadeRecord(
        "FGSM", "linf", 0.1, ["FGSM"], [1], records.accuracy(np.ones(3, bool)), {"FGSM": 0}, 0, [], None, 0, 0,
        records.Curve([1], [1.0]), None,
    )  # fmt: skip
    check = records.Check("noise", False, "suspect", "it broke", "as said")
    card = records.CardRecord(
        "x", "d", "digits", "i", 3, [0.0, 1.0], "default", "00", "float32", records.accuracy(np.ones(3, bool)),
        [attack], records.Sweep("PGD", "linf", [0.0, 0.1], [1.0, 1.0], 3), [check], "suspect: it broke: as said",
        records.provenance(),
    )  # fmt: skip
    path = tmp_path / "card.json"
    files.write_json(path, card)
    assert records.read_json(path, records.CardRecord) == card
    files.write_json(path, changed(dataclasses.asdict(card), change))
    with pytest.raises(ValueError, match=rf"card\.json: expected a CardRecord; .*{words}"):
        records.read_json(path, records.CardRecord)
