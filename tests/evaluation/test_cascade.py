import dataclasses
import itertools
import tracemalloc
import weakref
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
from rst_jax.config import PGDSettings
from rst_jax.evaluation.batch import Attacker
from rst_jax.evaluation.cascade import Cascade, run
from rst_jax.evaluation.classifier import Classifier
from rst_jax.evaluation.evidence import SHOWN, STANDING, WRONG, Evidence, Examples
from rst_jax.evaluation.images import ImageFile
from rst_jax.evaluation.programs import Programs, sizes
from rst_jax.evaluation.question import examine
from rst_jax.losses import margin
from rst_jax.runtime.files import read_arrays, write_arrays
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
    return fresh(batch_size, devices)


def fresh(batch_size=32, devices=1):
    return Programs(make_mesh(jax.devices()[:devices]), batch_size)


def attacker(programs, order=None, classifier=NETWORK):
    e = examples(programs.logits(classifier, IMAGES, N))
    if order is not None:
        e = Examples(*(getattr(e, name)[order] for name in ("images", "labels", "ids", "logits")))
    return Attacker(programs, classifier, e, KEY)


def evidence(batch_size=32, devices=1, cascade=None, order=None, folder=None, programs=None, keep=True):
    """What is found; unless it is kept in a folder, with all adversarial images."""
    cascade = cascade or Cascade("all", CASCADE, ThreatModel(0.06))
    programs = programs or made(batch_size, devices)
    return run(attacker(programs, order), cascade, folder, keep and folder is None)


def adversarial(found, images=IMAGES):
    """The adversarial images of all examples, clean where there is none."""
    whole = images[: len(found.attack)].copy()
    np.testing.assert_array_equal(found.kept, np.flatnonzero(found.attack >= 0))
    whole[found.kept] = found.adversarial
    return whole


def met(monkeypatch):
    """The batches that are attacked from now on: the attack's name, how many examples, and of how many rows."""
    seen, plain = [], Attacker.attack

    def attack(self, attack, threat, batch, tick):
        seen.append((attack.name, len(batch.index), batch.size))
        return plain(self, attack, threat, batch, tick)

    monkeypatch.setattr(Attacker, "attack", attack)
    return seen


def same(a: Evidence, b: Evidence, order=slice(None)):
    """Alike, `b` of the examples of `a` in an order; the adversarial images are those that both have kept."""
    for name, value in vars(a).items():
        if name in ("kept", "adversarial"):
            continue
        other = getattr(b, name)
        np.testing.assert_array_equal(value[order] if len(value) == N else value, other, err_msg=name)
    places = np.arange(N)[order]
    there = {places[i]: image for i, image in zip(b.kept, b.adversarial, strict=True)}
    here = dict(zip(a.kept.tolist(), a.adversarial, strict=True))
    both = here.keys() & there.keys()
    assert len(both) >= min(len(here), SHOWN)
    for i in both:
        np.testing.assert_array_equal(here[i], there[i])


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
    found = evidence(cascade=Cascade("all", CASCADE, threat))
    hit = found.attack >= 0
    assert 3 <= hit.sum() < 24
    assert not threat.violations(adversarial(found).astype(float), IMAGES.astype(float)).any()
    logits = np.asarray(apply(WEIGHTS, adversarial(found)))
    np.testing.assert_array_equal(np.argmax(logits, -1)[hit], found.prediction[hit])
    labels = examples(np.asarray(apply(WEIGHTS, IMAGES))).labels
    np.testing.assert_allclose(margin(logits, labels)[hit], found.margin[hit], atol=1e-5)
    assert (found.margin[hit] < 0).all()
    np.testing.assert_array_equal(found.kept, np.flatnonzero(hit))


@pytest.mark.parametrize(("batch_size", "devices"), [(4, 1), (8, 4), (29, 1)])
def test_nothing_hangs_on_batch_size_padding_or_devices(whole, batch_size, devices):
    same(whole, evidence(batch_size, devices))


def test_nothing_hangs_on_the_order_of_the_examples(whole):
    order = np.random.default_rng(1).permutation(N)
    same(whole, evidence(4, order=order), order)


def test_an_attack_is_compiled_once_a_size_and_not_again_for_another_radius(monkeypatch):
    programs, seen = fresh(16), met(monkeypatch)
    evidence(programs=programs)
    first = dict(programs.compiled)
    assert first.pop("logits") == 2  # of the clean images, and of claims
    assert first == {name: len({size for n, _, size in seen if n == name}) for name in ("APGD-T", "FAB-T", "Square")}
    assert len(seen) > sum(first.values())
    evidence(programs=programs, cascade=Cascade("wider", CASCADE, ThreatModel(0.061)))
    sizes_of = {name: len({size for n, _, size in seen if n == name}) for name in first}
    assert programs.compiled == {"logits": 2, **sizes_of}


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 16, 250])
@pytest.mark.parametrize("devices", [1, 4])
def test_no_program_runs_one_row_a_device(size, devices):
    there = sizes(size, devices)
    assert there == sorted(set(there))
    assert there[0] >= 2 * devices
    assert all(rows % devices == 0 for rows in there)
    assert size <= there[-1] < size + 2 * devices
    assert all(b <= 2 * a for a, b in itertools.pairwise(there))  # so that less than half is padding


def test_sizes_are_no_larger_than_there_are_examples(monkeypatch):
    """A batch size of 20,000 on 29 images costs what one of 29 does, verification included."""
    seen, programs = met(monkeypatch), fresh(20_000)
    placed, place = [], programs.place
    monkeypatch.setattr(programs, "toy", lambda *_: False)
    monkeypatch.setattr(programs, "place", lambda rows, size: placed.append(size) or place(rows, size))
    attacks = (*CASCADE, APGD(steps=3, rounds=30, near=0.9))
    evidence(programs=programs, cascade=Cascade("all", attacks, ThreatModel(0.06)))
    assert max(size for _, _, size in seen) == 29
    assert max(placed) == 29
    assert all(n <= size < max(2 * n, 3) for _, n, size in seen)


def test_a_toy_is_asked_for_in_one_size_and_one_call_a_round(monkeypatch):
    seen, found = met(monkeypatch), {}
    for toy in (True, False):
        seen.clear()
        calls, programs = [], fresh(16)
        assert programs.toy(NETWORK.apply, NETWORK.variables, IMAGES.shape[1:])
        monkeypatch.setattr(programs, "toy", lambda *_, toy=toy: toy)
        plain = programs.attack
        monkeypatch.setattr(programs, "attack", lambda *a, plain=plain, calls=calls: counting(plain(*a), calls))
        found[toy] = evidence(programs=programs)
        sizes = {size for _, _, size in seen}
        assert (sizes == {programs.sizes(N)[-1]}) == toy
        assert (len(calls) == len(seen)) == toy
    for name, value in vars(found[True]).items():
        np.testing.assert_array_equal(value, getattr(found[False], name), err_msg=name)


def counting(go_on, calls):
    return lambda *a: calls.append(1) or go_on(*a)


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
    cascade = Cascade("all", (APGD(steps=20), FAB(steps=4, rounds=2), Square(steps=50)), ThreatModel(eps))
    found, steps = [], set()
    for batch_size, devices in ((13, 1), (1, 1), (4, 4), (6, 1)):
        programs = fresh(batch_size, devices)
        plain = programs.one_by_one
        programs.one_by_one = lambda *a, plain=plain: (a[0].needs_gradient and steps.add(plain(*a))) or plain(*a)
        logits = programs.logits(network, images, 13)
        labels = np.argmax(logits, -1).astype(np.int32)
        e = Examples(images, labels, np.arange(13, dtype=np.int32), logits)
        found.append(run(Attacker(programs, network, e, KEY), cascade, keep_images=True))
    assert 1 <= found[0].standing.sum() <= 12
    assert steps == {side == 12}  # only those of a convolution that is not tiny are called one by one
    for other in found[1:]:
        for name, value in vars(found[0]).items():
            np.testing.assert_array_equal(value, getattr(other, name), err_msg=name)


@given(batch_size=st.integers(1, 40), devices=st.integers(1, 4), rows=st.lists(st.integers(0, N - 1), min_size=1))
@settings(max_examples=8, deadline=None)
def test_any_examples_in_batches_of_any_size_are_judged_alike(batch_size, devices, rows):
    rows = np.unique(rows)
    cascade = Cascade("few", (PGD("PGD-3", PGDSettings(3, 0.03, restarts=2)), Square(steps=20)), ThreatModel(0.06))
    found = evidence(batch_size, devices, cascade, order=rows)
    reference = evidence(cascade=cascade)
    for name, value in vars(found).items():
        if name not in ("unverified", "not_finite", "kept", "adversarial"):
            np.testing.assert_array_equal(value, getattr(reference, name)[rows], err_msg=name)
    np.testing.assert_array_equal(adversarial(found, IMAGES[rows]), adversarial(reference)[rows])


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 16, 250])
@pytest.mark.parametrize("devices", [1, 4])
def test_claims_are_judged_at_a_batch_size_that_no_attack_runs_at(size, devices):
    programs, seen = fresh(size, devices), []
    programs.place = lambda rows, size: seen.append(size) or jnp.zeros((size, *rows.shape[1:]))
    programs.logits(NETWORK, IMAGES[:1], N, another=True)
    assert seen[0] not in programs.sizes(N)
    assert seen[0] % devices == 0


@pytest.mark.parametrize("one_by_one", [False, True])
def test_a_batch_that_is_broken_ends_early(one_by_one, monkeypatch):
    programs, calls = fresh(), []
    monkeypatch.setattr(programs, "one_by_one", lambda *_: one_by_one)
    monkeypatch.setattr(programs, "toy", lambda *_: False)
    plain = programs.attack
    monkeypatch.setattr(programs, "attack", lambda *a: counting(plain(*a), calls))
    for eps, ends_early in ((1.0, True), (0.01, False)):
        calls.clear()
        found = evidence(programs=programs, cascade=Cascade("one", (APGD(steps=99),), ThreatModel(eps)))
        assert found.standing.any() == (not ends_early)
        assert (len(calls) < (100 if one_by_one else 10)) == ends_early


def test_broken_examples_leave_between_attacks_and_rounds(monkeypatch):
    seen = met(monkeypatch)
    found = evidence()
    for number, attack in enumerate(CASCADE):
        for turn in range(attack.rounds_of(4)):
            before = (found.attack >= 0) & ((found.attack < number) | ((found.attack == number) & (found.round < turn)))
            expected = attack.name, N - 5 - int(before.sum())
            assert seen.pop(0)[:2] == expected
    assert not seen


def test_the_bar_tells_what_is_done_and_what_is_broken(monkeypatch):
    class Bar:
        total = n = 0

        def __init__(self):
            self.told = []

        def update(self, n, about):
            self.n += n

        def show(self, text):
            assert self.n <= self.total
            self.told.append((self.n, self.total, text))

        def close(self):
            self.told.append((self.n, self.total, "closed"))

    bar = Bar()
    monkeypatch.setattr("rst_jax.evaluation.cascade.Progress", lambda *_: bar)
    found = evidence(8)
    assert bar.told[0] == (0, 24 * (3 * 9 + 2 * 4 + 61), "APGD-T, 0 broken, 24 stand")  # three targets of 4 classes
    *_, last, closed = bar.told
    assert last[2] == f"Square, {(found.attack >= 0).sum()} broken, {found.standing.sum()} stand"
    assert closed[0] == closed[1]
    assert all(a[0] <= b[0] for a, b in zip(bar.told, bar.told[1:], strict=False))


def test_a_cascade_of_the_first_examples_is_theirs(whole):
    few = evidence(cascade=Cascade("all", CASCADE, ThreatModel(0.06), examples=9))
    for name, value in vars(few).items():
        if len(value) == 9 and name not in ("kept", "adversarial"):
            np.testing.assert_array_equal(value, getattr(whole, name)[:9])


def test_killed_at_every_batch_the_cascade_is_the_same(whole, tmp_path, monkeypatch):
    plain, lives = Attacker.attack, []

    def mortal(self, *arguments):
        if lives and not lives.pop():
            raise KeyboardInterrupt
        return plain(self, *arguments)

    monkeypatch.setattr(Attacker, "attack", mortal)
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
    monkeypatch.setattr(Attacker, "attack", None)  # nothing is left to do
    same(whole, evidence(4, folder=tmp_path))


def test_a_torn_batch_is_made_again(whole, tmp_path, monkeypatch):
    plain, torn = Attacker.attack, []

    def stop(self, *arguments):
        if len(torn) == 3:
            raise KeyboardInterrupt
        torn.append(1)
        return plain(self, *arguments)

    monkeypatch.setattr(Attacker, "attack", stop)
    with pytest.raises(KeyboardInterrupt):
        evidence(4, folder=tmp_path)
    monkeypatch.setattr(Attacker, "attack", plain)
    pieces = sorted((tmp_path / "batches").iterdir())
    assert len(pieces) == 3
    pieces[1].write_bytes(pieces[1].read_bytes()[:100])
    for piece, change in ((0, {"held": None}), (2, {"queries": np.zeros(1, np.int32)})):
        write_arrays(pieces[piece], edited(read_arrays(pieces[piece]), change))
    same(whole, evidence(4, folder=tmp_path))


def edited(arrays, change):
    """Arrays, some of them others, or left out for None."""
    return {name: array for name, array in (arrays | change).items() if array is not None}


@pytest.mark.parametrize(
    "change",
    [
        {"attack": None},
        {"attack": np.full(N, 7, np.int16)},
        {"attack": np.full(N, -1, np.int64)},
        {"queries": np.zeros(N - 1, np.int32)},
        {"kept": np.asarray(3)},
        {"kept": np.arange(3)},
        {"kept": np.asarray([N]), "adversarial": np.zeros((1, 4, 5, 1), np.float32)},
        {"more": np.zeros(3)},
    ],
)
def test_what_is_no_evidence_of_these_examples_is_made_again(whole, tmp_path, change):
    same(whole, evidence(folder=tmp_path))
    told = read_arrays(tmp_path / "row.npz")
    like = Evidence.none(examples(made(32, 1).logits(NETWORK, IMAGES, N)), len(CASCADE))
    same(whole, Evidence.of_arrays(told, like))
    assert Evidence.of_arrays(edited(told, change), like) is None


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
    found = evidence(cascade=Cascade("lies", (Boaster(),), ThreatModel(0.06)))
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
    found = evidence(cascade=Cascade("lies", (Liar(kind), Noise(1)), threat))
    assert not (found.attack == 0).any()
    assert found.unverified[0] == N - 5
    assert found.failed.sum() == (0 if kind == "clean" else N - 5)  # what failed to run is never called robust
    assert (found.robust == (found.standing & ~found.failed)).all()
    assert found.not_finite[0] == (N - 5 if kind == "nan" else 0)


def test_a_network_that_cannot_be_traced_is_attacked_without_gradients(whole):
    def outside(images):
        images = np.asarray(images)
        return np.tanh(images.reshape(len(images), -1) @ WEIGHTS[0]) @ WEIGHTS[1]

    def called(_, x):
        return jax.pure_callback(outside, jax.ShapeDtypeStruct((x.shape[0], 4), jnp.float32), x)

    cascade = Cascade("blind", (Square(steps=200),), ThreatModel(0.12))
    found, inside = run(attacker(made(16, 1), classifier=Classifier(called)), cascade), evidence(16, cascade=cascade)
    assert found.standing.sum() < 22
    assert np.mean(found.standing == inside.standing) > 0.9


def test_restarts_and_targets_take_up_where_the_round_before_ended():
    found = evidence(cascade=Cascade("pgd", (PGD("PGD-3", PGDSettings(3, 0.03, restarts=4)),), ThreatModel(0.06)))
    standing = found.standing
    assert (found.queries[standing] == 16).all()
    assert (found.gradients[standing] == 16).all()
    assert (found.round[standing] == -1).all()
    hit = found.attack == 0
    np.testing.assert_array_equal(found.round[hit] * 4 < found.queries[hit], True)


def test_an_example_that_ties_is_attacked():
    """Its clean margin is 0 and it counts as right, since the first of equal logits names the class."""
    programs = made(16, 1)
    images = np.full_like(IMAGES, 0.5)
    tied = Classifier(lambda _, x: jnp.stack([0 * x[:, 0, 0, 0] + 0.5, x[:, 0, 0, 0]], -1))
    logits = programs.logits(tied, images, N)
    assert (logits[:, 0] == logits[:, 1]).all()
    e = Examples(images, np.zeros(N, np.int32), np.arange(N, dtype=np.int32), logits)
    cascade = Cascade("all", (PGD("PGD-3", PGDSettings(3, 0.03)),), ThreatModel(0.06))
    found = run(Attacker(programs, tied, e, KEY), cascade)
    assert (found.queries > 0).all()
    assert not found.standing.any()


def test_restarts_side_by_side_are_for_those_that_came_near():
    once, near = PGD("weak", PGDSettings(1, 0.024)), APGD(steps=3, rounds=5, near=0.5)
    threat = ThreatModel(0.06)
    alone = evidence(cascade=Cascade("one", (once,), threat))
    close = alone.standing & (alone.least <= 0.5 * alone.clean)
    assert 3 <= close.sum() < alone.standing.sum()
    found = evidence(cascade=Cascade("two", (once, near), threat))
    np.testing.assert_array_equal(found.queries - alone.queries > 0, close)
    assert (found.queries[close] <= 2 + 5 * 4).all()
    hit = found.attack == 1
    assert hit.any()
    assert close[hit].all()
    assert (found.round[hit] < 5).all()
    same(found, evidence(4, cascade=Cascade("two", (once, near), threat)))
    # One after the other, they find the same: the first restart that breaks an example is told.
    rounds = dataclasses.replace(near, near=float("inf"))
    named = type("Named", (APGD,), {"name": near.name})(**dataclasses.asdict(rounds))
    after = evidence(cascade=Cascade("three", (once, named), threat))
    for name in ("attack", "round"):
        np.testing.assert_array_equal(getattr(found, name)[hit], getattr(after, name)[hit])
    np.testing.assert_array_equal(adversarial(found)[hit], adversarial(after)[hit])


class Counted:
    """Images that are made when they are asked for, and how many were alive at once: of those that were read."""

    def __init__(self, n, shape):
        self.n, self.shape, self.alive, self.peak, self.read, self.calls = n, shape, 0, 0, 0, 0

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        images = np.stack([np.random.default_rng(int(i)).random(self.shape, np.float32) for i in index])
        weakref.finalize(images, self._gone, len(index))
        self.alive, self.read, self.calls = self.alive + len(index), self.read + len(index), self.calls + 1
        self.peak = max(self.peak, self.alive)
        return images

    def _gone(self, n):
        self.alive -= n


def test_no_more_than_a_few_batches_of_images_are_in_memory(tmp_path, monkeypatch):
    """5,000 images of 12 KiB are 58.6 MiB; batches of 100 are 1.2 MiB each."""
    n, shape, size = 5000, (32, 32, 3), 100
    images, weights = Counted(n, shape), np.random.default_rng(0).normal(size=(3072, 4)).astype(np.float32)
    linear = Classifier(lambda w, x: (x.reshape(x.shape[0], -1) - 0.5) @ w, weights)
    programs, threat = fresh(size), ThreatModel(0.005)
    labels = np.zeros(n, np.int32)
    e = examine(programs, linear, images, labels, np.arange(n), threat)
    assert images.read <= n + 1
    e = dataclasses.replace(e, labels=np.argmax(e.logits, -1).astype(np.int32))
    cascade = Cascade("two", (PGD("PGD-2", PGDSettings(2, 0.004)), Noise(2)), threat)
    run(Attacker(programs, linear, e, KEY), dataclasses.replace(cascade, examples=200))  # compiles
    assert e.image_shape == shape
    images.read = images.peak = 0
    tracemalloc.start()
    found = run(Attacker(programs, linear, e, KEY), cascade, tmp_path / "kept", keep_images=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    hit = found.attack >= 0
    assert 1000 < hit.sum() < n - 1000
    assert images.read == n + int(found.standing.sum() + (found.attack == 1).sum())  # once an attack
    assert images.peak <= 3 * size
    assert peak < 20 * 2**20
    assert len(found.kept) == SHOWN
    file = ImageFile(tmp_path / "kept" / "adversarial.npy")
    index = np.flatnonzero(hit)
    moved, clean = file.get(index), images[index]
    assert not threat.violations(moved.astype(float), clean.astype(float)).any()
    np.testing.assert_array_equal(np.argmax(np.asarray(linear.raw(moved)), -1), found.prediction[index])
    np.testing.assert_array_equal(moved[:SHOWN], found.adversarial)


def test_images_that_were_not_kept_are_made_again_where_they_are_asked_for(whole, tmp_path, monkeypatch):
    few = evidence(folder=tmp_path)
    same(whole, few)
    assert not (tmp_path / "adversarial.npy").exists()
    seen, programs = met(monkeypatch), made(32, 1)
    cascade = Cascade("all", CASCADE, ThreatModel(0.06))
    same(whole, run(attacker(programs), cascade, tmp_path, keep_images=True))
    assert seen
    np.testing.assert_array_equal(ImageFile(tmp_path / "adversarial.npy").get(whole.kept), whole.adversarial)
    seen.clear()
    run(attacker(programs), cascade, tmp_path, keep_images=True)
    assert not seen


def test_what_version_0_3_left_of_a_cascade_is_taken(whole, tmp_path, monkeypatch):
    """It kept an image of every example."""
    old = {name: value for name, value in vars(whole).items() if name != "kept"}
    write_arrays(tmp_path / "row.npz", {**old, "adversarial": adversarial(whole)})
    seen = met(monkeypatch)
    found = evidence(folder=tmp_path)
    assert not seen
    same(whole, found)
    np.testing.assert_array_equal(found.kept, whole.kept[:SHOWN])


def test_a_failure_in_any_round_of_an_example_is_kept():
    e = examples(np.asarray(apply(WEIGHTS, IMAGES)))
    found = Evidence.none(e, 1)
    index = np.array([1, 1, 2])
    n, image = len(index), IMAGES.shape[1:]
    zero = np.zeros(n, np.float32)
    done = dict.fromkeys(("margin", "distance", "least", "closest"), zero)
    done |= dict.fromkeys(("queries", "gradients", "flat", "target", "prediction"), np.zeros(n, np.int32))
    done |= {"held": np.zeros(n, bool), "adversarial": np.zeros((0, *image), np.float32)}
    done |= {"failed": np.array([True, False, False]), "unverified": np.int32(0), "not_finite": np.int32(0)}
    found.enter(0, np.array([0, 1, 0]), index, done)
    assert found.failed.nonzero()[0].tolist() == [1]
