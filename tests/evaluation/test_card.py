import dataclasses
import fcntl
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rst_jax
from rst_jax.attacks import Square
from rst_jax.evaluation.card import finished
from rst_jax.evaluation.classifier import of_function
from rst_jax.evaluation.programs import make_programs
from rst_jax.evaluation.question import examine
from rst_jax.evaluation.suites import ATTACKS, make_suite
from rst_jax.records import CardRecord, read_json
from rst_jax.reports.card import write_card_page
from rst_jax.runtime import progress
from rst_jax.runtime.files import read_arrays
from rst_jax.threat import ThreatModel
from tests.drawing import IMAGES as TICKET_IMAGES
from tests.drawing import draw

N = 24
RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(0.1, 0.9, (N, 5, 5, 1)).astype(np.float32)
HIDDEN, HEAD = RNG.normal(size=(25, 12)).astype(np.float32), RNG.normal(size=(12, 5)).astype(np.float32)
EPS = ThreatModel(0.025)


def network(x):
    return jnp.tanh((x.reshape(x.shape[0], -1) - 0.5) @ HIDDEN) @ HEAD


def outside(x):
    """The same in NumPy, which JAX cannot trace."""
    x = np.asarray(x)
    return np.tanh((x.reshape(len(x), -1) - 0.5) @ HIDDEN) @ HEAD


def backwards_less(x):
    """The same with a loop that JAX traces and cannot differentiate."""
    shift = jax.lax.while_loop(lambda c: c[1] < 1, lambda c: (c[0] * 1.0, c[1] + 1), (x[:, 0, 0], 0))[0]
    return network(x) + shift


LABELS = np.argmax(outside(IMAGES), -1)


def evaluate(logits_fn=network, attacks=("pgd-20",), images=IMAGES, labels=LABELS, threat=EPS, **options):
    return rst_jax.evaluate(logits_fn, images, labels, threat, attacks, batch_size=N, **options)


def plain(record):
    """A record without when and where it was made."""
    return dataclasses.asdict(dataclasses.replace(record, provenance=None))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card") / "here"
    return evaluate(attacks=("autoattack", "pgd-100x10"), folder=folder, keep_images=True), folder


def test_a_card_comes_back_from_its_file(made):
    card, folder = made
    assert read_json(folder / "card.json", CardRecord) == card.record
    assert rst_jax.load_card(folder) == card.record
    assert rst_jax.load_card(folder / "card.json") == card.record
    plain_json = json.loads((folder / "card.json").read_text())
    assert plain_json["rows"][0]["robust"]["n"] == N
    assert 0 <= plain_json["rows"][0]["robust"]["low"] <= plain_json["rows"][0]["robust"]["value"]


def test_the_evidence_says_of_every_example_what_the_record_sums_up(made):
    card, folder = made
    arrays = read_arrays(folder / "examples.npz")
    row = card.record.rows[0]
    attack = arrays["AutoAttack/attack"]
    assert [int((attack == k).sum()) for k in range(5)] == list(row.broken.values())
    assert row.robust.value == np.mean(attack == -1)
    assert row.queries == arrays["AutoAttack/queries"].sum()
    images = read_arrays(folder / "adversarials.npz")
    adversarial = images["AutoAttack/linf"]
    hit = attack >= 0
    assert 3 <= hit.sum() <= N - 3
    np.testing.assert_array_equal(np.argmax(outside(adversarial), -1)[hit], arrays["AutoAttack/prediction"][hit])
    assert np.abs(adversarial - IMAGES).max() <= 0.025 + 1e-6
    np.testing.assert_allclose(
        np.abs(adversarial - IMAGES).max(axis=(1, 2, 3))[hit], arrays["AutoAttack/distance"][hit], atol=1e-6
    )
    targeted = hit & np.isin(attack, [1, 2])
    assert (arrays["AutoAttack/target"][targeted] >= 0).all()


def test_the_table_names_what_a_reader_needs(made):
    told = str(made[0])
    for word in ("AutoAttack", "linf 0.025", "PGD-100x10", "noise", "clean", "95 %", "highest matmul", "verdict: "):
        assert word in told
    assert made[0].record.subject_digest[:12] in told


def test_the_page_shows_curves_and_images_and_nothing_foreign(made):
    _, folder = made
    page = write_card_page(folder).read_text()
    assert page.count("<figure>") == 2
    assert "<svg" in page
    assert "data:image/png" in page
    assert not any(link in page for link in ('src="http', 'href="http', "<script"))


def test_replayed_images_break_the_network_they_were_made_for_and_others_less(made):
    card, folder = made
    own = rst_jax.replay(network, folder)
    assert own["clean"] == (card.record.clean.value, N)
    assert own["AutoAttack/linf"] == (pytest.approx(card.record.rows[0].robust.value), N)
    other = rst_jax.replay(lambda x: network(x * 0.9 + 0.05), folder)
    assert other["AutoAttack/linf"] > own["AutoAttack/linf"]


def test_a_second_call_takes_what_is_there(made, monkeypatch):
    card, folder = made
    monkeypatch.setattr("rst_jax.evaluation.batch.Attacker.attack", None)
    again = evaluate(attacks=("autoattack", "pgd-100x10"), folder=folder, keep_images=True)
    assert plain(again.record) == plain(card.record)


def test_where_there_is_no_terminal_a_long_attack_tells_how_far_it_is(monkeypatch, capsys):
    monkeypatch.setattr(progress, "_EVERY", 0.0)
    evaluate()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rst_jax: PGD-20")]
    assert lines
    told = r"rst_jax: PGD-20 eps/4: .*\d+ broken, \d+ stand; [\d,]+ of [\d,]+ passes(, [\d.,]+ passes/s(, .+ left)?)?"
    assert all(re.fullmatch(told, line) for line in lines), lines


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"logits_fn": lambda x: network(x) * 1.01}, "model was"),
        ({"images": IMAGES * 0.99}, "images was"),
        ({"logits_fn": lambda x: network(jax.lax.stop_gradient(x))}, "model was"),
        ({"threat": ThreatModel(0.06)}, "threat models was"),
        ({"threat": ThreatModel(0.025 + 1e-9)}, "threat models was"),
        ({"threat": ThreatModel(0.025, upper=0.95)}, "threat models was"),
        ({"key": jax.random.key(1)}, "seed was"),
        ({"attacks": ("autoattack",)}, r"attacks was PGD-100 eps/40\(passes=101, .*\), now noise\("),
        ({"images": IMAGES[:5], "labels": LABELS[:5]}, "was [0-9a-f]{12}..., now [0-9a-f]{12}...; clean logits was"),
        ({"faithful": True}, "mode was"),
    ],
)
def test_a_folder_of_another_evaluation_is_refused(made, change, named):
    _, folder = made

    def there():  # but the lock, which says who held it last
        return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}

    before = there()
    with pytest.raises(ValueError, match=f"belongs to another evaluation: .*{named}"):
        evaluate(**{"attacks": ("autoattack", "pgd-100x10"), "folder": folder, **change})
    assert before == there()


def test_a_folder_that_holds_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(ValueError, match="holds other files and no evaluation"):
        evaluate(folder=tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        evaluate(folder=tmp_path / "thesis.txt")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"images": (IMAGES * 255).astype(np.uint8)}, "images must be float32 .*uint8.*Divide"),
        ({"images": IMAGES.astype(np.float64)}, "images must be float32"),
        ({"images": IMAGES * 255}, r"images must lie in \[0, 1\]; got values from"),
        ({"images": IMAGES - 0.5}, r"images must lie in \[0, 1\]"),
        ({"images": np.where(IMAGES > 0.5, np.float32("nan"), IMAGES)}, r"images must lie in \[0, 1\]"),
        ({"images": IMAGES[..., 0]}, r"images must be \[n, H, W, C\]"),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, "at least one"),
        ({"labels": LABELS[:-1]}, r"labels must be integers \[24\]"),
        ({"labels": LABELS + np.float32(0.5)}, "whole numbers"),
        ({"labels": np.where(np.arange(N) == 3, np.nan, LABELS)}, "whole numbers; got nan for image 3"),
        ({"labels": LABELS + 2**32}, r"labels must lie in .* got 429496729\d for image 0"),
        ({"labels": LABELS + 2**31}, "labels must lie in"),
        ({"labels": LABELS.astype(str)}, "labels must be integers"),
        ({"labels": np.eye(5)[LABELS]}, r"labels must be integers .* Take np\.argmax\(labels, -1\)"),
        ({"images": np.moveaxis(IMAGES, -1, 1)}, r"channels first; put them last with np\.transpose"),
        ({"labels": LABELS + 3}, r"labels must lie in \[0, 4\]"),
        ({"labels": LABELS - 1}, r"labels must lie in \[0, 4\]"),
        ({"logits_fn": lambda x: network(x) / 0}, "logits must be finite; those of image 0"),
        ({"logits_fn": lambda x: network(x)[:, 0]}, r"logits \[N, classes\]"),
        ({"logits_fn": lambda x: jnp.argmax(network(x), -1, keepdims=True)}, r"logits \[N, classes\]"),
        ({"ids": np.arange(N - 1)}, r"ids must be integers \[24\]"),
        ({"ids": np.arange(N) + 0.5}, "ids must be integers"),
        ({"ids": np.arange(N) // 2}, "ids must be different"),
        ({"ids": np.arange(N) + 2**31}, "ids must be different integers of 32 bits"),
        ({"key": 0}, "key must be one of jax.random.key's"),
        ({"key": jax.random.key(0, impl="rbg")}, "key must be one of jax.random.key's"),
        ({"threat": ThreatModel(8.0)}, "eps must be at most 1, where every image .* 8 / 255"),
        ({"threat": ThreatModel(float("inf"), "l2")}, "eps must be at most 5"),
        ({"logits_fn": backwards_less}, "needs gradients, and JAX cannot"),
        ({"attacks": ("autoatack",)}, "did you mean 'autoattack'"),
        ({"logits_fn": outside}, "needs gradients, and JAX cannot"),
    ],
)
def test_what_is_not_right_is_refused_in_a_sentence(change, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence) as error:
        evaluate(**change, folder=tmp_path / "new")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("logits_fn", [outside, backwards_less])
def test_where_there_are_no_gradients_the_other_attacks_run(logits_fn):
    card = evaluate(logits_fn, ("square", "bandits"), threat=ThreatModel(0.2))
    assert card.record.rows[0].broken["Square"] > 3
    assert card.record.rows[1].broken["Bandits"] > 0
    assert card.record.verdict == "trustworthy"


def test_labels_of_any_type_are_the_same_question():
    classifier = of_function(network, IMAGES[:2])
    programs, ids = make_programs(classifier, N), np.arange(N)
    kinds = (np.int32, np.uint8, np.int16, np.uint64, np.float32)
    found = [examine(programs, classifier, IMAGES, LABELS.astype(kind), ids, EPS) for kind in kinds]
    assert {each.digest for each in found} == {found[0].digest}
    assert {each.labels.dtype for each in found} == {np.dtype(np.int32)}


def test_half_precision_logits_are_taken():
    card = evaluate(lambda x: network(x).astype(jnp.bfloat16), ("fgsm",))
    assert 0 <= card.record.rows[0].robust.value < card.record.clean.value


@pytest.mark.parametrize(("lower", "upper"), [(-1.0, 1.0), (0.0, 255.0), (0.2, 0.8)])
def test_images_of_another_box_are_the_same_question(lower, upper):
    width = upper - lower
    images = (lower + width * IMAGES).astype(np.float32)
    images[:, 0, 0] = upper  # float32 may round it up

    def there(x):
        assert isinstance(x, jax.core.Tracer) or (x.min() >= np.float32(lower) and x.max() <= np.float32(upper))
        return network((x - lower) / width)

    labels = np.argmax(there(images), -1)
    card = evaluate(there, ("apgd-ce", "pgd-20"), images, labels, ThreatModel(0.025 * width, lower=lower, upper=upper))
    assert card.record.verdict == "trustworthy"
    assert card.record.box == [lower, upper]
    assert card.record.rows[0].unverified == 0
    assert card.record.rows[0].robust.value <= card.record.rows[1].robust.value


def test_a_folder_goes_on_at_another_batch_size(tmp_path):
    """Clean logits are digested to the last bit, so these too must not hang on it."""
    first = evaluate(attacks=("apgd-ce",), folder=tmp_path / "here")
    for batch_size in (1, 5):
        again = rst_jax.evaluate(
            network, IMAGES, LABELS, EPS, "apgd-ce", batch_size=batch_size, folder=tmp_path / "here"
        )
        assert plain(again.record) == plain(first.record)


def test_a_folder_in_use_is_refused(made):
    _, folder = made
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="is in use by another process; wait for it or take another folder"):
            evaluate(attacks=("autoattack", "pgd-100x10"), folder=folder, keep_images=True)


def test_curves_fall_from_the_clean_accuracy_to_the_robust_one(made):
    card, _ = made
    whole, restarts = card.record.rows[0], card.record.rows[1]
    assert whole.over_rounds is None
    assert restarts.over_rounds.effort == list(range(1, 11))
    for curve, row in ((whole.over_passes, whole), (restarts.over_passes, restarts), (restarts.over_rounds, restarts)):
        assert curve.robust[-1] == row.robust.value
        assert all(a >= b for a, b in itertools.pairwise([card.record.clean.value, *curve.robust]))
    e = card.evidence[1]
    assert restarts.over_rounds.robust[3] == np.mean(e.standing | ((e.attack == 0) & (e.round > 3)))
    spent, at = e.queries + e.gradients, restarts.over_passes.effort.index(100)
    assert restarts.over_passes.robust[at] == np.mean(e.standing | ((e.attack == 0) & (spent > 100)))


def test_fragile_examples_are_named():
    """A linear network broken by the smallest of margins."""
    w = np.zeros((25, 2), np.float32)
    w[0] = 1e-3, -1e-3
    images = np.full((3, 5, 5, 1), 0.51, np.float32)
    ids = np.array([7, 3, 9])
    card = rst_jax.evaluate(
        lambda x: (x.reshape(x.shape[0], -1) - 0.5) @ w, images, np.zeros(3, int), ThreatModel(0.02), "fgsm", ids=ids
    )
    assert card.record.rows[0].robust.value == 0
    assert card.record.rows[0].fragile == [7, 3, 9]
    assert "3 fragile" in str(card)


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_few_classes_fall_back_and_do_not_crash(classes):
    def few(x):
        return network(x)[:, :classes]

    labels = np.argmax(outside(IMAGES)[:, :classes], -1)
    card = evaluate(few, ("autoattack", "apgd-dlr"), labels=labels)
    row = card.record.rows[0]
    assert 0 < row.robust.value < 1
    assert row.rounds == [1, classes - 1, classes - 1, 1, 30]
    assert card.record.verdict == "trustworthy"


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_default_is_at_least_as_strong_as_the_published(norm):
    threat, robust = ThreatModel(0.05 if norm == "linf" else 0.2, norm), []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        scale = 10.0 ** rng.integers(-2, 3)  # logits of all sizes
        shapes = ((25, 12), (12, 5))
        weights = tuple(rng.normal(size=s).astype(np.float32) for s in shapes)
        x = rng.uniform(0, 1, (60, 5, 5, 1)).astype(np.float32)

        def deep(x, weights=weights, scale=scale):
            return scale * (jax.nn.relu((x.reshape(x.shape[0], -1) - 0.5) @ weights[0]) @ weights[1])

        labels = np.argmax(deep(x), -1)
        cards = [rst_jax.evaluate(deep, x, labels, threat, "autoattack", faithful=f) for f in (False, True)]
        robust.append([card.record.rows[0].robust.value for card in cards])
    default, published = np.transpose(robust)
    assert (default <= published).all(), robust
    assert 0.05 < published.mean() < 0.95


def test_the_key_moves_random_starts_and_nothing_else():
    first, again, other = (evaluate(attacks=("fgsm-rs", "fgsm"), key=jax.random.key(k)) for k in (0, 0, 5))
    for a, b, same in ((first, again, True), (first, other, False)):
        images = [c.evidence[0].adversarial for c in (a, b)]
        assert (images[0].shape == images[1].shape and bool((images[0] == images[1]).all())) == same
    assert len(first.evidence[1].kept) >= 3
    np.testing.assert_array_equal(first.evidence[1].adversarial, other.evidence[1].adversarial)


def cascades(names, threat):
    return make_suite(names, threat, (5, 5, 1)).cascades


def test_full_has_the_rows_of_a_card_in_both_norms():
    rows = cascades("full", ThreatModel(8 / 255))
    names = "FGSM, FGSM-RS, PGD-20 eps/4, PGD-100x10, CW-Linf, MIM, AutoAttack, AutoAttack L2, CW-L2, Square, noise"
    assert ", ".join(row.name for row in rows) == names
    assert [row.name for row in rows if row.threat.norm == "l2"] == ["AutoAttack L2", "CW-L2"]
    assert {float(row.threat.eps) for row in rows} == {8 / 255, 0.5}
    assert [row.name for row in cascades("full", ThreatModel(0.5, "l2"))] == [
        name for name in names.split(", ") if name not in ("CW-Linf", "AutoAttack L2")
    ]
    for make in ATTACKS.values():
        attacks = make(ThreatModel(0.1), False)
        assert len({attack.name for attack in attacks}) == len({attack.stream for attack in attacks}) == len(attacks)


def test_step_sizes_are_in_image_units_and_draws_hang_on_no_step_size():
    where = ThreatModel(0.1)
    names = ("fgsm", "fgsm-rs", "pgd-20", "pgd-100x10", "cw-linf")
    found = [cascades(name, where)[0].attacks[0] for name in names]
    assert [attack.settings.step_size for attack in found] == pytest.approx([0.1, 0.125, 0.025, 0.0025, 0.0025])
    # The words that version 0.3 drew from.
    assert [attack.stream for attack in found] == ["FGSM", "FGSM-RS", "PGD-20", "PGD-100", "CW-Linf"]
    assert cascades("bandits", where)[0].attacks[0].step_size == pytest.approx(0.01)


def test_a_finished_card_is_known_by_its_digest(made, tmp_path):
    card, folder = made
    assert finished(folder, card.record.subject_digest)
    assert not finished(folder, "0" * 64)
    assert not finished(tmp_path, card.record.subject_digest)
    (tmp_path / "card.json").write_text("{")
    assert not finished(tmp_path, card.record.subject_digest)


class Source:
    """Images that are read when they are asked for, and no array."""

    def __init__(self, images):
        self.images, self.most = images, 0

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        self.most = max(self.most, len(index))
        return self.images[np.asarray(index)]


def test_images_that_are_read_when_asked_for_make_the_same_card(tmp_path):
    source = Source(IMAGES)
    options = {"attacks": ("apgd-ce", "square"), "keep_images": True}
    found = rst_jax.evaluate(network, source, LABELS, EPS, **options, batch_size=6, folder=tmp_path / "read")
    assert source.most <= N  # 64 images are looked at, and 250 swept, at most
    whole = evaluate(**options, folder=tmp_path / "whole")
    assert plain(found.record) == plain(whole.record)
    same_files(tmp_path / "whole", tmp_path / "read")
    assert not list((tmp_path / "read").rglob("adversarial.npy"))


@pytest.mark.parametrize(
    ("names", "norm", "expected"),
    [
        ("fgsm", "linf", ["FGSM", "noise"]),
        (["noise", "mim", "mim"], "linf", ["MIM", "noise"]),
        ("pgd-20,square", "linf", ["PGD-20 eps/4", "Square", "noise"]),
        (" fgsm , mim", "linf", ["FGSM", "MIM", "noise"]),
        (("fgsm", "mim"), "linf", ["FGSM", "MIM", "noise"]),
        (["fgsm,mim", Square()], "linf", ["FGSM", "MIM", "Square", "noise"]),
        (iter(["fgsm", "fgsm,mim"]), "linf", ["FGSM", "MIM", "noise"]),
        (["autoattack-l2"], "l2", ["AutoAttack", "noise"]),
        (["autoattack", "autoattack-l2"], "linf", ["AutoAttack", "AutoAttack L2", "noise"]),
    ],
)
def test_every_row_is_there_once_and_noise_last(names, norm, expected):
    rows = cascades(names, ThreatModel(0.1, norm))
    assert [row.name for row in rows] == expected
    more = cascades(["full", "bandits"], ThreatModel(0.1, norm))
    assert [row.name for row in more][-2:] == ["Bandits", "noise"]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("pgd-20,,square", "there is no attack ''"),
        ("", "there is no attack ''"),
        ("pgd-20;square", "there is no attack 'pgd-20;square'"),
        (["fgsm", "pgd20"], "did you mean 'pgd-20'"),
        ([], "at least one"),
        (None, "must be names or attacks; got None"),
        (20, "must be names or attacks; got 20"),
        ([None], "there is no attack None"),
        ([["fgsm"]], "there is no attack"),
        (Square, "must be names or attacks"),
        ([Square], r"give one made, as in PGD\(\)"),
    ],
)
def test_what_names_no_attack_is_a_sentence(names, words):
    with pytest.raises(ValueError, match=words):
        make_suite(names, ThreatModel(0.1), (5, 5, 1))


def test_cw_linf_is_of_linf():
    assert "CW-Linf" not in [row.name for row in cascades("full", ThreatModel(0.5, "l2"))]
    with pytest.raises(ValueError, match="under L2 take cw-l2"):
        cascades("cw-linf", ThreatModel(0.5, "l2"))


def test_a_ticket_is_named_by_its_digest():
    ticket, _ = draw()
    card = rst_jax.evaluate(ticket, TICKET_IMAGES, np.zeros(5, np.int32), ThreatModel(0.1), "fgsm")
    assert card.record.subject == "ratio-0.1"
    assert card.record.subject_digest == ticket.digest


_CHILD = """
import sys
import rst_jax
from tests.evaluation.test_card import EPS, IMAGES, LABELS, network
rst_jax.evaluate(
    network, IMAGES, LABELS, EPS, ("autoattack", "pgd-100x10"), batch_size=4, folder=sys.argv[1], keep_images=True
)
"""


@pytest.mark.slow
def test_killed_at_random_twenty_times_the_card_is_the_same(tmp_path):
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "PYTHONPATH": os.getcwd()}

    def start(folder):
        return subprocess.Popen([sys.executable, "-c", _CHILD, str(folder)], env=environment, stderr=subprocess.DEVNULL)

    def written(folder):
        there = os.walk(folder / "rows")  # which takes it well that folders vanish
        return {f"{where}/{n}" for where, _, names in there for n in names if n.endswith(".npz") and n[0] != "."}

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole).wait() == 0  # compiles everything
    moments, kills, within, lives = np.random.default_rng(0), 0, 0, 0
    while kills < 20:
        process, before, lives = start(killed), written(killed), lives + 1
        more = moments.integers(0, 7)  # files after which it is killed
        while process.poll() is None and len(written(killed) - before) < more:
            time.sleep(0.003)
        time.sleep(moments.uniform(0, 0.05))
        if process.poll() is None:
            process.kill()
            kills += 1
            within += (killed / "rows").exists() and not (killed / "card.json").exists()
        else:  # it came to its end: begin anew
            same_files(whole, killed)
            killed.rename(tmp_path / f"finished-{lives}")
        assert process.wait() in (0, -signal.SIGKILL)
    assert within >= 15  # of the kills came while rows were being made
    assert start(killed).wait() == 0
    same_files(whole, killed)


def same_files(whole, killed):
    records = [plain(rst_jax.load_card(folder)) for folder in (whole, killed)]
    assert records[0] == records[1]
    for name in ("examples.npz", "adversarials.npz", "gallery.npz"):
        a, b = (read_arrays(folder / name) for folder in (whole, killed))
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_another_default_kind_of_random_key_changes_nothing():
    first = evaluate(attacks=("fgsm-rs", "square"))
    with jax.default_prng_impl("rbg"):
        again = evaluate(attacks=("fgsm-rs", "square"))
    assert plain(again.record) == plain(first.record)
    for a, b in zip(first.evidence, again.evidence, strict=True):
        np.testing.assert_array_equal(a.adversarial, b.adversarial)
