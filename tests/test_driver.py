import dataclasses
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rst_jax.attacks import APGD, FAB, PGD, Attack, Found, Noise, Problem, Square
from rst_jax.attacks.noise import NoiseState
from rst_jax.driver import STANDING, WRONG, Classifier, Driver, Evidence, Examples, Row, margins, within
from rst_jax.mesh import make_mesh
from rst_jax.threat import ThreatModel

N, KEY = 29, np.asarray(jax.random.key_data(jax.random.key(3)))
RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(0, 1, (N, 4, 5, 1)).astype(np.float32)
WEIGHTS = tuple(RNG.normal(size=shape).astype(np.float32) for shape in ((20, 16), (16, 4)))
CASCADE = (APGD("dlr-targeted", steps=8, rounds=9), FAB(steps=4, rounds=2), Square(steps=60))


def apply(variables, images):
    hidden, head = variables
    return jnp.tanh(images.reshape(images.shape[0], -1) @ hidden) @ head


NETWORK = Classifier(apply, WEIGHTS)


def examples(logits):
    labels = np.argmax(logits, -1).astype(np.int32)
    labels[::6] = (labels[::6] + 1) % 4  # some are wrong without any attack
    return Examples(IMAGES, labels, np.arange(100, 100 + N, dtype=np.int32), logits)


@lru_cache
def made(batch_size, devices):
    return Driver(make_mesh(jax.devices()[:devices]), batch_size, KEY)


def evidence(batch_size=32, devices=1, row=None, order=None, folder=None, driver=None):
    driver = driver or made(batch_size, devices)
    e = examples(driver.logits(NETWORK, IMAGES))
    if order is not None:
        e = Examples(*(getattr(e, f.name)[order] for f in dataclasses.fields(e)))
    return driver.run(row or Row("all", CASCADE, ThreatModel(0.06)), NETWORK, e, folder)


def same(a: Evidence, b: Evidence, order=slice(None)):
    for name, value in vars(a).items():
        other = getattr(b, name)
        np.testing.assert_array_equal(value[order] if len(value) == N else value, other, err_msg=name)


@pytest.fixture(scope="module")
def whole():
    return evidence()


def test_the_cascade_breaks_some_of_these_and_not_all(whole):
    assert (whole.attack == WRONG).sum() == 5
    assert (whole.attack == 0).sum() >= 3
    assert (whole.attack == STANDING).sum() >= 3


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_what_is_counted_is_misclassified_and_in_ball_and_box(norm):
    threat = ThreatModel(0.06 if norm == "linf" else 0.25, norm)
    found = evidence(row=Row("all", CASCADE, threat))
    hit = found.attack >= 0
    assert 3 <= hit.sum() < 24
    assert within(threat, found.adversarial, IMAGES)[hit].all()
    logits = np.asarray(apply(WEIGHTS, found.adversarial))
    np.testing.assert_array_equal(np.argmax(logits, -1)[hit], found.prediction[hit])
    labels = examples(np.asarray(apply(WEIGHTS, IMAGES))).labels
    np.testing.assert_allclose(margins(logits, labels)[hit], found.margin[hit], atol=1e-5)
    assert (found.margin[hit] < 0).all()
    np.testing.assert_array_equal(found.adversarial[~hit], IMAGES[~hit])


@pytest.mark.parametrize(("batch_size", "devices"), [(4, 1), (8, 4), (29, 1)])
def test_nothing_hangs_on_batch_size_padding_or_devices(whole, batch_size, devices):
    same(whole, evidence(batch_size, devices))


def test_nothing_hangs_on_the_order_of_the_examples(whole):
    order = np.random.default_rng(1).permutation(N)
    same(whole, evidence(4, order=order), order)


def test_a_row_compiles_once_a_size_and_another_radius_nothing():
    driver = Driver(make_mesh(jax.devices()[:1]), 16, KEY)
    evidence(driver=driver)
    first = dict(driver.programs.compiled)
    assert all(count <= 2 * len(driver.sizes) for count in first.values())
    evidence(driver=driver, row=Row("wider", CASCADE, ThreatModel(0.061)))
    assert sum(driver.programs.compiled.values()) - sum(first.values()) <= 4  # a size that the first did not need
    before = dict(driver.programs.compiled)
    evidence(driver=driver, row=Row("again", CASCADE, ThreatModel(0.061)))
    assert driver.programs.compiled == before


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 16, 250])
@pytest.mark.parametrize("devices", [1, 4])
def test_claims_are_judged_at_a_batch_size_that_no_attack_runs_at(size, devices):
    driver, seen = Driver(make_mesh(jax.devices()[:devices]), size, KEY), []
    driver._place = lambda rows, size: seen.append(size) or jnp.zeros((size, *rows.shape[1:]))
    driver.logits(NETWORK, IMAGES[:1], another=True)
    assert seen[0] not in driver.sizes
    assert seen[0] % devices == 0


def test_a_batch_that_is_broken_ends_early():
    found = evidence(row=Row("wide", (APGD(steps=100),), ThreatModel(1.0)))
    assert not found.standing.any()
    assert found.queries.max() < 100


def test_a_row_of_the_first_examples_is_theirs(whole):
    few = evidence(row=Row("all", CASCADE, ThreatModel(0.06), examples=9))
    for name, value in vars(few).items():
        if len(value) == 9:
            np.testing.assert_array_equal(value, getattr(whole, name)[:9])


def test_killed_at_every_batch_the_row_is_the_same(whole, tmp_path, monkeypatch):
    plain, lives = Driver._batch, []

    def mortal(self, *arguments):
        if lives and not lives.pop():
            raise KeyboardInterrupt
        return plain(self, *arguments)

    monkeypatch.setattr(Driver, "_batch", mortal)
    kills = 0
    for _ in range(200):
        lives[:] = [False, True]
        try:
            found = evidence(4, folder=tmp_path)
            break
        except KeyboardInterrupt:
            kills += 1
    assert kills >= 12
    same(whole, found)
    assert [p.name for p in tmp_path.iterdir()] == ["row.npz"]
    monkeypatch.setattr(Driver, "_batch", None)  # nothing is left to do
    same(whole, evidence(4, folder=tmp_path))


def test_a_torn_batch_is_made_again(whole, tmp_path, monkeypatch):
    plain, torn = Driver._batch, []

    def stop(self, *arguments):
        if len(torn) == 3:
            raise KeyboardInterrupt
        torn.append(1)
        return plain(self, *arguments)

    monkeypatch.setattr(Driver, "_batch", stop)
    with pytest.raises(KeyboardInterrupt):
        evidence(4, folder=tmp_path)
    monkeypatch.setattr(Driver, "_batch", plain)
    pieces = sorted((tmp_path / "batches").iterdir())
    assert len(pieces) == 3
    pieces[1].write_bytes(pieces[1].read_bytes()[:100])
    same(whole, evidence(4, folder=tmp_path))


@dataclasses.dataclass(frozen=True)
class Liar(Attack):
    """Claims what is not so."""

    kind: str
    name = "Liar"
    steps = 0
    rounds = 1

    def start(self, p: Problem, drawn: tuple) -> NoiseState:
        return NoiseState(Found.clean(p))

    def step(self, p: Problem, s: NoiseState, i: jax.Array, drawn: tuple) -> NoiseState:
        lies = {
            "clean": p.images,
            "far": p.images * 0 + 0.5,
            "outside": p.images + 0.05,
            "nan": p.images * jnp.nan,
        }[self.kind]
        return NoiseState(s.found._replace(adversarial=lies, broken=jnp.ones_like(s.found.broken)))


@pytest.mark.parametrize("kind", ["clean", "far", "outside", "nan"])
def test_a_claim_that_does_not_hold_is_not_counted_and_is_reported(kind):
    threat = ThreatModel(0.06) if kind != "outside" else ThreatModel(0.06, upper=0.5)
    found = evidence(row=Row("lies", (Liar(kind), Noise(1)), threat))
    assert not (found.attack == 0).any()
    assert found.unverified[0] == N - 5
    assert found.not_finite[0] == (N - 5 if kind == "nan" else 0)


def test_a_network_that_cannot_be_traced_is_attacked_without_gradients(whole):
    def outside(images):
        images = np.asarray(images)
        return np.tanh(images.reshape(len(images), -1) @ WEIGHTS[0]) @ WEIGHTS[1]

    def called(_, x):
        return jax.pure_callback(outside, jax.ShapeDtypeStruct((x.shape[0], 4), jnp.float32), x)

    row = Row("blind", (Square(steps=200),), ThreatModel(0.12))
    driver = made(16, 1)
    e = examples(driver.logits(Classifier(called), IMAGES))
    found, inside = driver.run(row, Classifier(called), e), evidence(16, row=row)
    assert found.standing.sum() < 22
    assert np.mean(found.standing == inside.standing) > 0.9


def test_restarts_and_targets_take_up_where_the_round_before_ended():
    found = evidence(row=Row("pgd", (PGD("PGD-3", 3, 0.5, rounds=4),), ThreatModel(0.06)))
    standing = found.standing
    assert (found.queries[standing] == 16).all()
    assert (found.gradients[standing] == 16).all()
    assert (found.round[standing] == -1).all()
    hit = found.attack == 0
    np.testing.assert_array_equal(found.round[hit] * 4 < found.queries[hit], True)


def test_an_example_that_ties_is_attacked():
    """Its clean margin is 0 and it counts as right, since the first of equal logits names the class."""
    driver = made(16, 1)
    images = np.full_like(IMAGES, 0.5)
    tied = Classifier(lambda _, x: jnp.stack([0 * x[:, 0, 0, 0] + 0.5, x[:, 0, 0, 0]], -1))
    logits = driver.logits(tied, images)
    assert (logits[:, 0] == logits[:, 1]).all()
    e = Examples(images, np.zeros(N, np.int32), np.arange(N, dtype=np.int32), logits)
    found = driver.run(Row("all", (PGD("PGD-3", 3, 0.5),), ThreatModel(0.06)), tied, e)
    assert (found.queries > 0).all()
    assert not found.standing.any()


def test_restarts_side_by_side_are_for_those_that_came_near():
    once, near = PGD("weak", 1, 0.4), APGD(steps=3, rounds=5, near=0.5)
    threat = ThreatModel(0.06)
    alone = evidence(row=Row("one", (once,), threat))
    close = alone.standing & (alone.least <= 0.5 * alone.clean)
    assert 3 <= close.sum() < alone.standing.sum()
    found = evidence(row=Row("two", (once, near), threat))
    np.testing.assert_array_equal(found.queries - alone.queries > 0, close)
    assert (found.queries[close] <= 2 + 5 * 4).all()
    hit = found.attack == 1
    assert hit.any()
    assert close[hit].all()
    assert (found.round[hit] < 5).all()
    same(found, evidence(4, row=Row("two", (once, near), threat)))
    # One after the other, they find the same: the first restart that breaks an example is told.
    rounds = dataclasses.replace(near, near=float("inf"))
    named = type("Named", (APGD,), {"name": near.name})(**dataclasses.asdict(rounds))
    after = evidence(row=Row("three", (once, named), threat))
    for name in ("attack", "round", "adversarial"):
        np.testing.assert_array_equal(getattr(found, name)[hit], getattr(after, name)[hit])
