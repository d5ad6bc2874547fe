import dataclasses
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rst_jax.attacks import APGD, FAB, PGD, Attack, Found, Noise, Problem, Square
from rst_jax.attacks.cw import CWState
from rst_jax.attacks.noise import NoiseState
from rst_jax.evaluation.cascade import Classifier, Driver, Row
from rst_jax.evaluation.evidence import STANDING, WRONG, Evidence, Examples
from rst_jax.losses import margin
from rst_jax.runtime.mesh import make_mesh
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
    assert not threat.violations(found.adversarial.astype(float), IMAGES.astype(float)).any()
    logits = np.asarray(apply(WEIGHTS, found.adversarial))
    np.testing.assert_array_equal(np.argmax(logits, -1)[hit], found.prediction[hit])
    labels = examples(np.asarray(apply(WEIGHTS, IMAGES))).labels
    np.testing.assert_allclose(margin(logits, labels)[hit], found.margin[hit], atol=1e-5)
    assert (found.margin[hit] < 0).all()
    np.testing.assert_array_equal(found.adversarial[~hit], IMAGES[~hit])


@pytest.mark.parametrize(("batch_size", "devices"), [(4, 1), (8, 4), (29, 1)])
def test_nothing_hangs_on_batch_size_padding_or_devices(whole, batch_size, devices):
    same(whole, evidence(batch_size, devices))


def test_nothing_hangs_on_the_order_of_the_examples(whole):
    order = np.random.default_rng(1).permutation(N)
    same(whole, evidence(4, order=order), order)


def test_a_row_compiles_each_attack_once_and_another_radius_nothing():
    driver = Driver(make_mesh(jax.devices()[:1]), 16, KEY)
    evidence(driver=driver)
    first = dict(driver.programs.compiled)
    assert first == {"logits": 2, "APGD-T": 1, "FAB-T": 1, "Square": 1}  # logits: of the clean images, and of claims
    evidence(driver=driver, row=Row("wider", CASCADE, ThreatModel(0.061)))
    assert driver.programs.compiled == first


def test_a_size_is_compiled_where_it_saves_more_than_it_costs(whole):
    """Whether it does or not, the evidence is the same."""
    made = {}
    for worth in (1e-30, 1e30):
        driver, seen = Driver(make_mesh(jax.devices()[:1]), 32, KEY), []
        driver.programs.worth = worth
        batch = driver._batch
        driver._batch = lambda *a, batch=batch, seen=seen: seen.append((len(a[5][0]), a[6])) or batch(*a)
        same(whole, evidence(driver=driver))
        assert all(n <= size for n, size in seen)
        made[worth] = sum(driver.programs.compiled.values()), sum(size - n for n, size in seen)
    assert made[1e-30][0] > made[1e30][0]
    assert made[1e-30][1] < made[1e30][1]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 16, 250])
@pytest.mark.parametrize("devices", [1, 4])
def test_no_program_runs_one_row_a_device(size, devices):
    driver = Driver(make_mesh(jax.devices()[:devices]), size, KEY)
    assert driver.sizes[0] >= 2 * devices
    assert all(rows % devices == 0 for rows in driver.sizes)
    assert size <= driver.sizes[-1] < size + 2 * devices


def wide(variables, images):
    hidden, head = variables
    return jax.nn.relu(images.reshape(images.shape[0], -1) @ hidden) @ head


def convolved(variables, images):
    kernel, head = variables
    x = jax.lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jnp.mean(jax.nn.relu(x), axis=(1, 2)) @ head


@pytest.mark.slow
@pytest.mark.parametrize(
    ("apply", "side", "shapes", "eps"),
    [
        (wide, 32, ((3072, 64), (64, 10)), 0.004),
        (convolved, 12, ((3, 3, 3, 16), (16, 10)), 0.02),
        (convolved, 5, ((3, 3, 3, 4), (4, 10)), 0.1),
    ],
)
def test_nothing_hangs_on_batch_size_for_wide_and_convolutional_networks(apply, side, shapes, eps):
    """XLA's kernels for one row by itself add up in another order, and those for 4,096 numbers or more."""
    rng = np.random.default_rng(1)
    weights = tuple(rng.normal(size=s).astype(np.float32) / np.prod(s[:-1]) ** 0.5 for s in shapes)
    network, images = Classifier(apply, weights), rng.uniform(0, 1, (13, side, side, 3)).astype(np.float32)
    row = Row("all", (APGD(steps=20), FAB(steps=4, rounds=2), Square(steps=50)), ThreatModel(eps))
    found, steps = [], set()
    for batch_size, devices in ((13, 1), (1, 1), (4, 4), (6, 1)):
        driver = Driver(make_mesh(jax.devices()[:devices]), batch_size, KEY)
        plain = driver.programs.one_by_one
        driver.programs.one_by_one = lambda *a, plain=plain: (a[0].needs_gradient and steps.add(plain(*a))) or plain(*a)
        logits = driver.logits(network, images)
        labels = np.argmax(logits, -1).astype(np.int32)
        found.append(driver.run(row, network, Examples(images, labels, np.arange(13, dtype=np.int32), logits)))
    assert 1 <= found[0].standing.sum() <= 12
    assert steps == {side == 12}  # only those of a convolution that is not tiny are called one by one
    for other in found[1:]:
        for name, value in vars(found[0]).items():
            np.testing.assert_array_equal(value, getattr(other, name), err_msg=name)


@given(batch_size=st.integers(1, 40), devices=st.integers(1, 4), rows=st.lists(st.integers(0, N - 1), min_size=1))
@settings(max_examples=8, deadline=None)
def test_any_examples_in_batches_of_any_size_are_judged_alike(batch_size, devices, rows):
    rows = np.unique(rows)
    row = Row("few", (PGD("PGD-3", 3, 0.5, rounds=2), Square(steps=20)), ThreatModel(0.06))
    found = evidence(batch_size, devices, row, order=rows)
    reference = evidence(row=row)
    for name, value in vars(found).items():
        if name not in ("unverified", "not_finite"):
            np.testing.assert_array_equal(value, getattr(reference, name)[rows], err_msg=name)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 16, 250])
@pytest.mark.parametrize("devices", [1, 4])
def test_claims_are_judged_at_a_batch_size_that_no_attack_runs_at(size, devices):
    driver, seen = Driver(make_mesh(jax.devices()[:devices]), size, KEY), []
    driver._place = lambda rows, size: seen.append(size) or jnp.zeros((size, *rows.shape[1:]))
    driver.logits(NETWORK, IMAGES[:1], another=True)
    assert seen[0] not in driver.sizes
    assert seen[0] % devices == 0


@pytest.mark.parametrize("one_by_one", [False, True])
def test_a_batch_that_is_broken_ends_early(one_by_one, monkeypatch):
    driver, calls = Driver(make_mesh(jax.devices()[:1]), 32, KEY), []
    driver.programs.worth = 1  # look as often as may be
    monkeypatch.setattr(driver.programs, "one_by_one", lambda *_: one_by_one)
    plain = driver.programs.attack

    def counted(*arguments):
        go_on = plain(*arguments)
        return lambda *a: calls.append(1) or go_on(*a)

    monkeypatch.setattr(driver.programs, "attack", counted)
    for eps, ends_early in ((1.0, True), (0.01, False)):
        calls.clear()
        found = evidence(driver=driver, row=Row("one", (APGD(steps=99),), ThreatModel(eps)))
        assert found.standing.any() == (not ends_early)
        assert (len(calls) < (100 if one_by_one else 10)) == ends_early


def test_broken_examples_leave_between_attacks_and_rounds():
    driver, met = Driver(make_mesh(jax.devices()[:1]), 32, KEY), []
    plain = driver._batch
    driver._batch = lambda attack, *a: met.append((attack.name, len(a[4][0]))) or plain(attack, *a)
    found = evidence(driver=driver)
    for number, attack in enumerate(CASCADE):
        for turn in range(attack.rounds_of(4)):
            before = (found.attack >= 0) & ((found.attack < number) | ((found.attack == number) & (found.round < turn)))
            expected = attack.name, N - 5 - int(before.sum())
            assert met.pop(0) == expected
    assert not met


def test_the_bar_tells_what_is_done_and_what_is_broken(monkeypatch):
    class Bar:
        total = n = 0

        def __init__(self):
            self.told = []

        def update(self, n):
            self.n += n

        def set_postfix_str(self, text):
            assert self.n <= self.total
            self.told.append((self.n, self.total, text))

        def close(self):
            self.told.append((self.n, self.total, "closed"))

    bar = Bar()
    monkeypatch.setattr("rst_jax.evaluation.cascade.progress", lambda *_: bar)
    found = evidence(8)
    assert bar.told[0] == (0, 24 * (3 * 9 + 2 * 4 + 61), "APGD-T, 0 broken, 24 stand")  # three targets of 4 classes
    *_, last, closed = bar.told
    assert last[2] == f"Square, {(found.attack >= 0).sum()} broken, {found.standing.sum()} stand"
    assert closed[0] == closed[1]
    assert all(a[0] <= b[0] for a, b in zip(bar.told, bar.told[1:], strict=False))


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


@dataclasses.dataclass(frozen=True)
class Boaster(Attack):
    """Says that its closest images are closer than they are; some are outside the box."""

    name = "Boaster"
    steps = 0
    rounds = 1

    def start(self, p: Problem, drawn: tuple) -> CWState:
        zero = jnp.zeros(p.labels.shape, jnp.float32)
        rest = dict.fromkeys(("w", "first", "second", "c", "low", "high", "reached"), zero)
        outside = (p.labels % 2 == 0)[:, None, None, None]
        image = jnp.where(outside, -1.0, 1.0 - jnp.round(p.images))
        return CWState(found=Found.clean(p), image=image, closest=zero + 1e-3, **rest)

    def step(self, p: Problem, s: CWState, i: jax.Array, drawn: tuple) -> CWState:
        return s


def test_the_closest_image_is_measured_and_judged_here():
    found = evidence(row=Row("lies", (Boaster(),), ThreatModel(0.06)))
    e = examples(np.asarray(apply(WEIGHTS, IMAGES)))
    image = 1 - np.round(IMAGES)
    far = np.linalg.norm((image - IMAGES).reshape(N, -1), axis=1)
    good = e.right & (e.labels % 2 == 1) & (np.argmax(apply(WEIGHTS, image), -1) != e.labels)
    assert good.sum() >= 3
    np.testing.assert_allclose(found.closest, np.where(good, far, np.inf), rtol=1e-5)
    assert found.unverified[0] == (e.right & ~good).sum() > 0


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
