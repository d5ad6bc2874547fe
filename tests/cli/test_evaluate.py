import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from rst_jax.main import run_command
from rst_jax.reports.card import load_card
from rst_jax.runtime.files import read_arrays

TICKET = str(next((Path(__file__).parents[2] / "zoo").glob("digits-*-0.3-*.ticket")))
DIGITS = ("--dataset", "digits", "--eps", "0.12")


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))


def typed(*words):
    return run_command(["rst_jax", *map(str, words)])


def test_a_ticket_is_evaluated_shown_and_replayed(tmp_path, capsys):
    out = tmp_path / "card"
    words = ("evaluate", TICKET, *DIGITS, "--attacks", "fgsm,apgd-ce", "--examples", 20, "--keep_images", "--out", out)
    assert typed(*words) == 0
    told = capsys.readouterr().out
    assert "FGSM" in told
    assert "APGD-CE" in told
    assert "verdict: trustworthy" in told
    assert (out / "index.html").exists()
    assert read_arrays(out / "adversarials.npz")["FGSM/linf"].shape == (20, 8, 8, 1)
    assert typed("show", out) == 0
    assert capsys.readouterr().out.strip() in told
    assert typed("show", out / "card.json", "--checks") == 0
    assert "passed  deterministic: logits of" in capsys.readouterr().out
    assert typed("evaluate", TICKET, "--replay", out) == 0
    clean = json.loads((out / "card.json").read_text())["clean"]["value"]
    assert f"clean: {100 * clean:.1f} % of 20" in capsys.readouterr().out
    assert typed(*words[:-1], out, "--seed", 3) == 2
    assert "belongs to another evaluation: seed was" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "required: ticket"),
        ((TICKET,), "expected --dataset"),
        (("no.ticket", *DIGITS), "no.ticket: there is no such file"),
        ((__file__, *DIGITS), "not a readable file of arrays"),
        ((TICKET, "--dataset", "digits"), "expected --eps"),
        ((TICKET, *DIGITS, "--atacks", "fgsm"), "no option --atacks; did you mean '--attacks'?"),
        ((TICKET, "--dataset", "digits", "--eps", "8"), "must lie in [0, 1]"),
        ((TICKET, "--dataset", "digits", "--eps", "8/0"), "expected a number or a fraction"),
        ((TICKET, *DIGITS, "--attacks", "pgd20"), "did you mean 'pgd-20'?"),
        ((TICKET, *DIGITS, "--examples", "few"), "expected a whole number; got 'few'"),
        ((TICKET, *DIGITS, "--norm", "l1"), "invalid choice: 'l1'"),
        ((TICKET, *DIGITS, "--seed", "4294967296"), "--seed must be below 2**32"),
        ((TICKET, *DIGITS, "--batch_size", "0"), "--batch_size must be at least 1"),
        ((TICKET, "--dataset", "npz", "--data_path", "no.npz", "--eps", "0.1"), "there is none at no.npz"),
        ((TICKET, *DIGITS, "--seed", "9" * 26), "--seed must be below 2**32; got 9999"),
        ((TICKET, *DIGITS, "--examples", "-1"), "--examples must be at least 0"),
        ((TICKET, *DIGITS, "--batch_size", "99999999999"), "--batch_size must be at most 2147483647"),
        ((TICKET, *DIGITS, "--attacks", "full", "--eps_l2", "-1"), "--eps_l2 must be at least 0"),
        ((TICKET, *DIGITS, "--attacks", "full", "--eps_l2", "nan"), "expected a number"),
        ((TICKET, "--dataset", "digits", "--norm", "l2", "--eps", "-.5"), "--eps must be at least 0"),
        ((TICKET, *DIGITS, "--eps_l2", "1"), "--eps_l2 has no effect here"),
        ((TICKET, *DIGITS, "--name", "ratio-0.3"), "--name has no effect here"),
        ((TICKET, *DIGITS, "--data_path", "x.npz"), "--data_path has no effect here"),
        ((TICKET, *DIGITS, "--data_dir", "x"), "--data_dir has no effect here"),
        ((TICKET, "--replay", "nowhere"), "there are no adversarial images"),
        ((TICKET, "--replay", "nowhere", "--eps", ".1"), "--eps has no effect here: --replay"),
    ],
)
def test_what_is_not_right_is_told_in_a_sentence_and_code_2(words, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert typed("evaluate", *words) == 2
    told = capsys.readouterr().err
    assert sentence in told
    assert told.startswith("rst_jax: ")
    assert not (tmp_path / "cards").exists()


def test_a_ticket_for_other_images_is_refused(tmp_path, capsys):
    images, labels = np.zeros((4, 6, 6, 1), np.uint8), np.arange(4)
    np.savez(tmp_path / "d.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    assert typed("evaluate", TICKET, "--dataset", "npz", "--data_path", tmp_path / "d.npz", "--eps", ".1") == 2
    assert "the ticket takes images [8, 8, 1]; npz has [6, 6, 1]" in capsys.readouterr().err


def test_two_npy_files_are_evaluated_on(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bunch = load_digits()
    images = np.rint(bunch.images[..., None] * 255 / 16).astype(np.uint8)
    np.save("fog.npy", images[:40])
    np.save("labels.npy", bunch.target[:40].astype(np.uint8))
    words = ("--dataset", "npz", "--data_path", "fog.npy", "--eps", "0.12", "--attacks", "fgsm", "--skip", 30)
    assert typed("evaluate", TICKET, *words, "--out", "card") == 0
    record = load_card("card")
    assert (record.dataset, record.n) == ("fog", 10)
    assert record.clean.value > 0.5
    assert "cards" not in os.listdir()
    assert typed("evaluate", "fog.npy", *words) == 2
    assert "fog.npy: not a readable file of arrays (it is one array" in capsys.readouterr().err
    assert typed("evaluate", TICKET, *words, "--skip", -1) == 2
    assert "--skip must be at least 0" in capsys.readouterr().err


def test_labels_that_the_ticket_does_not_know_are_named_before_the_work(tmp_path, capsys):
    images = np.zeros((4, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "d.npz", x_test=images, y_test=np.asarray([1, 10, 2, 3]))
    words = ("--dataset", "npz", "--data_path", tmp_path / "d.npz", "--eps", ".1", "--out", tmp_path / "card")
    assert typed("evaluate", TICKET, *words) == 2
    assert "labels must lie in [0, 9] and be whole numbers; got 10 for image 1" in capsys.readouterr().err
    assert not (tmp_path / "card").exists()


def test_no_card_is_told(capsys, tmp_path):
    assert typed("show", tmp_path) == 2
    assert "there is no card at" in capsys.readouterr().err
    (tmp_path / "card.json").write_text("{}")
    assert typed("show", tmp_path) == 2
    assert "expected a CardRecord" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["draw", "evaluate", "show", "plan"])
def test_help_is_printed(word, capsys):
    assert typed(word, "--help") == 0
    assert "usage: python -m rst_jax" in capsys.readouterr().out


@pytest.mark.slow
def test_sigterm_stops_between_batches_with_code_75_and_the_same_command_goes_on(tmp_path):
    out = tmp_path / "card"
    words = ["evaluate", TICKET, *DIGITS, "--attacks", "pgd-100x10", "--examples", "40", "--batch_size", "10"]
    command = [sys.executable, "-m", "rst_jax", *words, "--out", str(out)]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    batches = out / "rows" / "pgd-100x10" / "batches"
    while process.poll() is None and len(list(batches.glob("[!.]*"))) < 2:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert "stopped by SIGTERM" in process.communicate()[1]
    assert process.returncode == 75
    assert len(list(batches.glob("[!.]*"))) >= 2
    assert not (out / "card.json").exists()
    assert subprocess.run(command, env=environment, check=False, stdout=subprocess.DEVNULL).returncode == 0
    whole = tmp_path / "whole"
    assert subprocess.run([*command[:-1], str(whole)], env=environment, check=False).returncode == 0
    for name in ("examples.npz", "gallery.npz"):
        a, b = read_arrays(out / name), read_arrays(whole / name)
        assert a.keys() == b.keys()
        assert all(np.array_equal(a[key], b[key]) for key in a)
