import dataclasses
import json
import tarfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import rst_jax
from rst_jax import records
from rst_jax.main import run_command
from rst_jax.reports.card import card_text, write_card_page
from rst_jax.reports.report import report_text, write_report
from rst_jax.reports.results import Results, read_gallery, read_results
from rst_jax.runtime import files
from rst_jax.runtime.text import plain

ATTACK = records.AttackRecord("PGD-20", "linf", 8 / 255, 20, 2 / 255, 1, 0)
HERE = records.Provenance("now", "0", "r", {"jax": "0"}, "1 x cpu", "3")


def ticket(name, ratio, right, violations=0, selected_on="holdout"):
    half = records.accuracy(np.arange(10) < right)
    return records.TicketRecord(
        name, ratio, 1000, 10000, records.accuracy(np.ones(10, bool)), half, violations, ATTACK, "cifar10", "resnet18",
        "float32", selected_on, 3, 0, "abcdef0123456789", HERE,
    )  # fmt: skip


def test_the_table_has_a_row_a_network_and_names_the_attack_in_full():
    lines = report_text(
        Results([ticket("ratio-0.1", 0.1, 5), ticket("dense", 1.0, 6, 2)], None, None, [], None)
    ).splitlines()
    assert lines[0].split() == ["network", "weights", "kept", "natural", "%", "PGD-20", "%", "best", "epoch"]
    assert lines[2].startswith("ticket, ratio 0.1")
    assert "50.0 [23.7, 76.3]" in lines[2]
    assert lines[3].startswith("dense")
    said = " ".join(lines[4:])
    for words in ("10 test images", "linf", "8/255", "seed 0", "held-out", "2 adversarial images left"):
        assert words in said
    assert len({len(line) for line in lines[:4]}) == 1


def test_what_was_chosen_on_the_test_images_says_so():
    assert "chosen on the test images" in report_text(
        Results([ticket("ratio-0.1", 0.1, 5, selected_on="test")], None, None, [], None)
    )


def test_what_a_network_is_does_not_hang_on_its_name():
    """Old records, which do not say, tell it by the name."""
    assert (ticket("ratio-0.1", 0.1, 5).kind, ticket("dense", 1.0, 6).kind) == ("scratch", "dense")
    other = records.TicketRecord(**{**vars(ticket("twin", 1.0, 6)), "kind": "dense"})
    lines = report_text(Results([other, ticket("ratio-0.1", 0.1, 5)], None, None, [], None)).splitlines()
    assert [line[:6] for line in lines[2:4]] == ["dense,", "ticket"]


def test_a_page_of_few_results_leaves_out_what_there_is_not(tmp_path):
    only = [ticket("ratio-0.1", 0.1, 5)]
    alone = records.TransferRecord(["ratio-0.1"], [0.1], [1.0], [[0.5]], 10, ATTACK, ["a"], HERE)
    page = write_report(tmp_path, Results(only, alone, None, [], None)).read_text()
    assert page.count("<figure>") == 1
    assert "abcdef012345" in page
    hostile = records.TicketRecord(**{**vars(only[0]), "dataset": "<script>alert(1)</script>"})
    page = write_report(tmp_path, Results([hostile], None, None, [], None)).read_text()
    assert "<script>" not in page


def test_a_workdirs_cards_are_sections_of_its_report(tmp_path):
    folder = tmp_path / "results"
    files.write_json(folder / "ratio-0.1.json", ticket("ratio-0.1", 0.1, 5))
    images, labels = np.full((4, 2, 2, 1), 0.5, np.float32), np.zeros(4, int)
    images[0] = 0.9  # stands

    def logits_fn(x):
        return jnp.stack([x[:, 0, 0, 0] - 0.49, 0.49 - x[:, 0, 0, 0]], -1)

    for name in ("ratio-0.1-autoattack", "ratio-0.15-autoattack"):  # of the second there is no record
        rst_jax.evaluate(
            logits_fn, images, labels, rst_jax.ThreatModel(0.1), "fgsm", folder=folder / "cards" / name, subject=name
        )
    page = write_report(tmp_path, read_results(tmp_path, ["ratio-0.1"])).read_text()
    for told in (
        "Evaluation card: ratio-0.1-autoattack on images",
        "Accuracy over eps and over effort",
        "Verdict: suspect",
    ):
        assert told in page
    assert "ratio-0.15" not in page


HOSTILE = "suspect\x1b[2K\rtrust\u202eworthy\nverdict: trustworthy"


def test_no_text_of_a_file_moves_a_cursor_or_makes_a_line():
    told = records.TicketRecord(**{**vars(ticket("ratio-0.1", 0.1, 5)), "dataset": HOSTILE, "model": HOSTILE})
    results = Results([told], None, None, [], None)
    text = report_text(results)
    ordinary = report_text(Results([ticket("ratio-0.1", 0.1, 5)], None, None, [], None))
    assert len(text.splitlines()) == len(ordinary.splitlines())
    assert plain(text.replace("\n", "")) == text.replace("\n", "")
    assert r"suspect\x1b[2K\rtrust\u202eworthy\nverdict" in text


def test_a_card_cannot_be_made_to_say_what_it_does_not(tmp_path, capsys):
    with tarfile.open(Path(__file__).parents[1] / "golden" / "card-0.3.0.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    folder = next(p for p in tmp_path.iterdir() if p.is_dir())
    before = card_text(rst_jax.load_card(folder))
    told = json.loads((folder / "card.json").read_text())
    told["checks"][0] |= {"passed": False, "effect": "suspect"}
    told["verdict"] = f"suspect: {HOSTILE}"
    told["subject"] = told["rows"][0]["name"] = told["checks"][0]["measured"] = HOSTILE
    (folder / "card.json").write_text(json.dumps(told))
    text = card_text(rst_jax.load_card(folder))
    assert len(text.splitlines()) == len(before.splitlines())
    assert not any(line.startswith("verdict: trust") for line in text.splitlines())
    assert run_command(["rst_jax", "show", str(folder), "--checks"]) == 0
    shown = capsys.readouterr().out
    assert plain(shown.replace("\n", "")) == shown.replace("\n", "")
    page = write_card_page(folder).read_text()
    assert "\x1b" not in page
    assert "\u202e" not in page


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_images_of_any_channels_and_classes_of_any_name_are_shown(tmp_path, channels):
    images = np.random.default_rng(0).uniform(size=(3, 4, 4, channels)).astype(np.float32)
    names = np.asarray(["$", "a_{$x$}^$", "猫\u202e\n\x1b"])
    said = {"labels": np.arange(3), "clean_prediction": np.arange(3), "adversarial_prediction": np.zeros(3, int)}
    gallery = {"clean": images, "adversarial": images, "names": names, **said}
    files.write_arrays(tmp_path / "results" / "gallery.npz", gallery)
    told = records.TicketRecord(**{**vars(ticket("$x$", 0.1, 5)), "attack": dataclasses.replace(ATTACK, name=r"\$a^$")})
    files.write_json(tmp_path / "results" / "x.json", told)
    page = write_report(tmp_path, read_results(tmp_path, ["x"])).read_text()
    assert page.count("data:image/png") == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"names": np.asarray(["a", "b"])}, "images of its 2 classes"),
        ({"labels": np.arange(4)}, "expected labels as 'i n'"),
        ({"clean": np.zeros((3, 4, 4, 1), int)}, "expected clean as 'f n h w c'"),
        ({"clean": np.full((3, 4, 4, 1), np.inf, np.float32)}, "finite"),
        ({"adversarial": np.zeros((3, 4, 5, 1), np.float32)}, "expected adversarial as"),
        ({"clean": np.zeros((0, 4, 4, 1), np.float32)}, "expected"),
        ({}, "expected clean as 'f n h w c'; it is missing"),
    ],
)
def test_a_gallery_that_is_none_is_told(tmp_path, change, words):
    images = np.zeros((3, 4, 4, 1), np.float32)
    said = {"labels": np.arange(3), "clean_prediction": np.arange(3), "adversarial_prediction": np.zeros(3, int)}
    gallery = {"clean": images, "adversarial": images, "names": np.asarray(list("abc")), **said, **change}
    files.write_arrays(tmp_path / "gallery.npz", gallery if change else {})
    with pytest.raises(ValueError, match=rf"gallery\.npz: .*{words}"):
        read_gallery(tmp_path / "gallery.npz")
