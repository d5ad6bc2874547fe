"""Planted failures: each must change the verdict, and a plain network must pass."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rst_jax
from rst_jax.attacks import APGD, Noise, Square
from rst_jax.evaluation.cascade import Cascade
from rst_jax.evaluation.checks import check_cascade, check_function, check_suite, check_sweep, verdict
from rst_jax.evaluation.evidence import Evidence, Examples
from rst_jax.records import Check
from rst_jax.threat import ThreatModel

N, CLASSES = 40, 4
RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(0.2, 0.8, (N, 5, 5, 1)).astype(np.float32)
W = RNG.normal(size=(25, CLASSES)).astype(np.float32)
EPS = ThreatModel(0.03)


def plain(x):
    return (x.reshape(x.shape[0], -1) - 0.5) @ W


LABELS = np.argmax(plain(IMAGES), -1)


def card(logits_fn, attacks="apgd-ce", **options):
    return rst_jax.evaluate(logits_fn, IMAGES, LABELS, EPS, attacks, batch_size=N, **options)


def failed(card):
    return {check.name.split(": ")[-1] for check in card.record.checks if not check.passed}


def test_a_plain_network_is_trusted():
    found = card(plain, ["autoattack", "square"])
    assert found.record.verdict == "trustworthy"
    assert all(check.passed for check in found.record.checks)
    assert 0.2 < found.record.rows[0].robust.value < 0.8


def test_killed_gradients_are_seen():
    found = card(lambda x: plain(jax.lax.stop_gradient(x)))
    assert found.record.verdict.startswith("suspect")
    assert "gradients" in failed(found)


def test_gradients_that_die_after_the_start_are_seen():
    """At the clean images and near them they are there; the published check looks only at the start."""

    def dying(x):
        far = jnp.max(jnp.abs(x - IMAGES[: x.shape[0]]), axis=(1, 2, 3), keepdims=True) > 0.025
        return plain(jnp.where(far, jax.lax.stop_gradient(x), x))

    found = card(dying)
    assert "gradients" in failed(found)


def test_quantised_inputs_are_seen_behind_a_straight_through_gradient():
    def rounded(x):
        return plain(x + jax.lax.stop_gradient(jnp.round(x * 16) / 16 - x))

    assert "continuous" in failed(card(rounded))


@pytest.mark.parametrize("shift", [0, 2000])
def test_a_frozen_key_is_seen(shift):
    def noisy(x):
        return plain(x) + 0.05 * jax.random.normal(jax.random.key(0), (x.shape[0], CLASSES)) + shift

    found = card(noisy)
    assert found.record.verdict.startswith("invalid")
    assert failed(found) >= {"deterministic"}


def test_logits_far_from_zero_are_deterministic():
    assert "deterministic" not in failed(card(lambda x: plain(x) + 2000))


def test_pythons_random_is_seen_though_jit_freezes_it():
    found = card(lambda x: plain(x) * (1 + random.random()) + random.random())
    assert found.record.verdict.startswith("invalid")


def test_statistics_of_the_batch_are_seen():
    assert "deterministic" in failed(card(lambda x: plain(x - jnp.mean(x, axis=0, keepdims=True))))


def test_probabilities_are_seen():
    found = card(lambda x: jax.nn.softmax(plain(x)))
    assert found.record.verdict.startswith("invalid: outputs lie in")
    assert "these are probabilities" in found.record.verdict


def test_probabilities_in_percent_are_seen():
    assert card(lambda x: 100 * jax.nn.softmax(plain(x))).record.verdict.startswith("invalid: outputs lie in")


OUTPUTS = {
    "times 1e-6": lambda x: plain(x) * 1e-6,
    "times 1e-12": lambda x: plain(x) * 1e-12,
    "times 1e6": lambda x: plain(x) * 1e6,
    "plus 1e5": lambda x: plain(x) + 1e5,
    "plus 1e3": lambda x: plain(x) + 1e3,
    "minus 1e5": lambda x: plain(x) - 1e5,
    "of mean 0, plus 1e5": lambda x: plain(x) - jnp.mean(plain(x), -1, keepdims=True) + 1e5,
    "not below 0, times 1e-6": lambda x: jnp.maximum(plain(x), 0) * 1e-6,
    "softmax": lambda x: jax.nn.softmax(plain(x)),
    "softmax, unsure": lambda x: jax.nn.softmax(plain(x) * 1e-3),
    "softmax, sure": lambda x: jax.nn.softmax(plain(x) * 1e3),
    "softmax of 16 bits": lambda x: jax.nn.softmax(plain(x).astype(jnp.bfloat16)),
    "softmax times 1e-6": lambda x: jax.nn.softmax(plain(x)) * 1e-6,
    "softmax times 255": lambda x: jax.nn.softmax(plain(x)) * 255,
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_probabilities_are_known_whatever_the_size_of_the_outputs(name):
    def raw(x):
        return np.asarray(OUTPUTS[name](x)).astype(np.float32)

    found = {check.name: check for check in check_function(raw, raw, IMAGES, EPS)}
    assert found["deterministic"].passed
    assert found["logits"].passed != name.startswith("softmax")
    assert found["logits"].passed or found["logits"].effect == "invalid"


@pytest.mark.parametrize("size", [1e-20, 1e-6, 1.0, 1e6])
def test_noise_is_seen_whatever_the_size_of_the_logits(size):
    noise = np.random.default_rng(0)

    def raw(x):
        return ((plain(x) + 0.01 * noise.normal(size=(len(x), CLASSES))) * size).astype(np.float32)

    assert not check_function(raw, raw, IMAGES, EPS)[0].passed


def test_sigmoids_are_suspect():
    found = card(lambda x: jax.nn.sigmoid(plain(x)))
    assert found.record.verdict.startswith("suspect: outputs lie in")
    assert "these look like probabilities" in found.record.verdict


@pytest.mark.parametrize("attack", ["noise", "fgsm", "pgd-20", "mim"])
def test_weak_attacks_alone_are_suspect(attack):
    found = card(plain, attack)
    assert failed(found) == {"effort, linf 0.03"}
    assert "only weak attacks were run" in found.record.verdict


def test_log_probabilities_are_logits():
    assert "logits" not in failed(card(lambda x: jax.nn.log_softmax(plain(x))))


def test_saturated_logits_are_seen_and_do_not_stop_the_default_attack():
    found, faithful = (card(lambda x: 1000 * plain(x), faithful=f) for f in (False, True))
    assert "not saturated" in failed(found)
    reference = card(plain)
    assert found.record.rows[0].robust.value <= reference.record.rows[0].robust.value
    assert faithful.record.rows[0].robust.value > reference.record.rows[0].robust.value


def test_gradients_that_mislead_are_seen_by_square():
    @jax.custom_jvp
    def backwards(x):
        return x

    backwards.defjvp(lambda primals, tangents: (primals[0], -tangents[0]))
    found = card(lambda x: plain(backwards(x)), ["autoattack", "square"])
    assert {"white box first"} <= failed(found)
    assert any(name.startswith("black box no better") for name in failed(found))
    assert found.record.verdict.startswith("suspect")


def test_a_network_that_looks_at_nothing_does_not_fall_to_zero():
    def constant(x):
        return 0 * plain(x) + jnp.arange(CLASSES, dtype=jnp.float32)

    found = rst_jax.evaluate(constant, IMAGES, np.full(N, CLASSES - 1), EPS, "apgd-ce")
    assert "falls to zero" in failed(found)


def test_what_is_not_a_number_away_from_the_images_is_seen():
    def fragile(x):
        far = jnp.mean(jnp.abs(x - 0.5), axis=(1, 2, 3)) > 0.185
        return jnp.where(far[:, None], jnp.nan, plain(x))

    keep = np.mean(np.abs(IMAGES - 0.5), axis=(1, 2, 3)) < 0.17
    assert keep.sum() > 10
    for label in range(CLASSES):  # class 0 is what an argmax names where nothing is a number
        mine = keep & (label == LABELS)
        assert mine.any()
        found = rst_jax.evaluate(fragile, IMAGES[mine], LABELS[mine], ThreatModel(0.1), "apgd-ce")
        assert "finite" in failed(found)
        assert found.record.verdict.startswith("invalid")


def test_gradients_that_are_not_a_number_are_seen():
    def rooted(x):
        return plain(x) + jnp.sqrt(jnp.maximum(x.reshape(x.shape[0], -1)[:, :1] - 2, 0))

    mine = LABELS == 0
    found = rst_jax.evaluate(rooted, IMAGES[mine], LABELS[mine], EPS, "apgd-ce")
    assert "finite" in failed(found)
    assert found.record.verdict.startswith("invalid")
    assert found.record.verdict.startswith("invalid")


def test_accuracy_that_rises_with_eps_is_suspect():
    assert verdict(check_sweep([0, 0.1, 0.2, 1], [0.9, 0.5, 0.4, 0.0], 100)) == "trustworthy"
    assert "rises by 10.0 points" in verdict(check_sweep([0, 0.1, 0.2, 1], [0.9, 0.5, 0.6, 0.0], 100))


def evidence(attack, **changes):
    n = len(attack)
    logits = np.tile(np.array([[1.0, 0.0]], np.float32), (n, 1))
    examples = Examples(np.zeros((n, 1, 1, 1), np.float32), np.zeros(n, np.int32), np.arange(n, dtype=np.int32), logits)
    found = Evidence.none(examples, 2)
    found.attack[:] = attack
    for name, value in changes.items():
        setattr(found, name, value)
    return found, logits, examples.labels


def names(checks):
    return {check.name for check in checks if not check.passed}


def test_two_in_a_thousand_may_fall_to_square_and_three_may_not():
    row = Cascade("AutoAttack", (APGD(), Square()), EPS)
    for late, expected in ((2, set()), (3, {"white box first"})):
        attack = np.full(1000, -1)
        attack[:late], attack[late : late + 300] = 1, 0
        assert names(check_cascade(row, *evidence(attack))) == expected


def test_blind_rows_are_held_against_all_that_see():
    rows = [Cascade("a", (APGD(),), EPS), Cascade("b", (APGD("dlr"),), EPS), Cascade("noise", (Noise(),), EPS)]
    one, two, noise = (np.full(100, -1) for _ in range(3))
    one[:10], two[10:20], noise[5:22] = 0, 0, 0
    hard = {"queries": np.full(100, 101), "gradients": np.full(100, 101)}
    assert not names(check_suite(rows[:2], [evidence(one, **hard)[0], evidence(two, **hard)[0]]))
    found = check_suite(rows, [evidence(a, **hard)[0] for a in (one, two, noise)])
    assert names(found) == {"black box no better, linf 0.03"}
    assert "broke 2 of 100" in found[-1].measured
    # A row of the first examples hides nothing of what comes after them.
    rows.append(Cascade("few", (APGD(),), EPS, examples=5))
    few = {name: value[:5] for name, value in hard.items()}
    again = check_suite(rows, [*(evidence(a, **hard)[0] for a in (one, two, noise)), evidence(one[:5], **few)[0]])
    assert names(again) == names(found)
    # Nor does it stand for them where they were hardly attacked.
    weak = check_suite(rows[2:], [evidence(np.full(100, -1))[0], evidence(one[:5], **few)[0]])
    assert "effort, linf 0.03" in names(weak)


def test_claims_that_do_not_hold_are_suspect():
    attack = np.full(100, 0)
    row = Cascade("a", (APGD(), Square()), EPS)
    assert not names(check_cascade(row, *evidence(attack, unverified=np.array([1, 0]))))
    assert names(check_cascade(row, *evidence(attack, unverified=np.array([4, 0])))) == {"verified"}


def test_the_gravest_verdict_is_the_one():
    good, bad, worse = (
        Check(n, n == "a", e, n, "why") for n, e in (("a", "invalid"), ("b", "suspect"), ("c", "invalid"))
    )
    assert verdict([good]) == "trustworthy"
    assert verdict([good, bad]) == "suspect: b: why"
    assert verdict([good, bad, worse]) == "invalid: c: why"


@pytest.mark.parametrize("attack", ["mim", "apgd-t", "fab", "fab-t"])
def test_killed_gradients_are_seen_by_every_attack_with_gradients(attack):
    found = card(lambda x: plain(jax.lax.stop_gradient(x)), attack)
    assert "gradients" in failed(found)
