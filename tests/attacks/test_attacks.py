import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from jax import lax
from scipy.optimize import linprog, minimize

from rst_jax.attacks import APGD, CWL2, FAB, MIM, PGD, Bandits, Problem, Square
from rst_jax.attacks.attack import Found, advance, normal, uniform
from rst_jax.attacks.fab import to_hyperplane
from rst_jax.attacks.square import pattern
from rst_jax.config import PGDSettings
from rst_jax.threat import ThreatModel

NORMS = ("linf", "l2")
# These programs compile for far longer than they run.
QUICKLY: dict = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):
    QUICKLY["xla_cpu_use_fusion_emitters"] = False
ATTACKS = {
    "pgd": PGD("PGD-5", PGDSettings(5, 0.04)),
    "mim": MIM(5),
    "apgd-ce": APGD("ce", 6),
    "apgd-dlr": APGD("dlr", 6),
    "apgd-t": APGD("dlr-targeted", 6),
    "fab": FAB(targeted=False, steps=4),
    "fab-t": FAB(targeted=True, steps=4),
    "square": Square(12),
    "cw": CWL2(iterations=6, searches=3, rate=0.1),
    "bandits": Bandits(6),
}


@functools.partial(
    jax.jit,
    static_argnames=("attack", "network", "norm"),
    compiler_options=QUICKLY,
)
def path(attack, network, norm, weights, eps, state, sampled, *rows):
    """The states of an attack, the start's first, each array [passes + 1, N, ...]."""
    *rows, keys = rows
    p = Problem(lambda x: network(weights, x), ThreatModel(eps, norm), *rows, jax.random.wrap_key_data(keys))

    def body(state, i):
        return advance(attack, p, state, i, sampled), state

    last, states = lax.scan(body, state, jnp.arange(attack.passes, dtype=jnp.int32))
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), states, last)


@dataclasses.dataclass
class Case:
    """Images and a network that they go through."""

    network: object
    weights: tuple
    images: np.ndarray
    labels: np.ndarray
    keys: np.ndarray

    def logits(self, images=None):
        return np.asarray(forward(self.network, self.weights, self.images if images is None else images))

    def margins(self, images=None):
        z, own = self.logits(images), np.eye(self.weights[1].shape[-1], dtype=bool)[self.labels]
        return z[own] - np.where(own, -np.inf, z).max(1)

    @property
    def wrong(self):
        return self.logits().argmax(1) != self.labels

    def rows(self, rows):
        rows = np.asarray(rows)
        return dataclasses.replace(self, images=self.images[rows], labels=self.labels[rows], keys=self.keys[rows])

    def path(self, attack, norm, eps, rank=2):
        targets = np.argsort(-self.logits(), 1, kind="stable")[:, rank - 1].astype(np.int32)
        targets = targets if rank else np.full_like(targets, -1)
        rows = self.images, self.logits(), self.labels, targets, self.keys
        p = Problem(functools.partial(self.network, self.weights), ThreatModel(eps, norm), *rows)
        first, sampled = attack.sample(p)
        start = attack.start(p, first)
        states = path(attack, self.network, norm, self.weights, np.float32(eps), start, sampled, *rows)
        return jax.tree.map(np.asarray, states)

    def end(self, attack, norm, eps, rank=2):
        return jax.tree.map(lambda a: a[-1], self.path(attack, norm, eps, rank))


@functools.partial(jax.jit, static_argnums=0)
def forward(network, weights, images):
    return network(weights, images)


def affine(weights, x):
    return jnp.matmul(x.reshape(x.shape[0], -1), weights[0], precision="highest") + weights[1]


def two_layers(weights, x):
    first, second = weights
    hidden = jax.nn.relu(jnp.matmul(x.reshape(x.shape[0], -1) - 0.5, first, precision="highest"))
    return jnp.matmul(hidden, second, precision="highest")


def small_network(n, shape, classes, seed):
    """A random network and images, of which about every fourth has a random label, not the predicted one."""
    rng = np.random.default_rng(seed)
    size = math.prod(shape)
    weights = (rng.normal(size=(size, 12)) / size**0.5, rng.normal(size=(12, classes)))
    weights = tuple(w.astype(np.float32) for w in weights)
    images = rng.uniform(size=(n, *shape)).astype(np.float32)
    case = Case(two_layers, weights, images, np.zeros(n, np.int32), rng.integers(2**32, size=(n, 2), dtype=np.uint32))
    labels = np.where(rng.uniform(size=n) < 0.25, rng.integers(classes, size=n), case.logits().argmax(1))
    return dataclasses.replace(case, labels=labels.astype(np.int32))


# Linear models


@functools.cache
def linear(classes):
    """A linear model, twelve images that it is right on, and their true distances to the nearest boundary."""
    n, seed = 12, {2: 0, 5: 1}[classes]
    rng = np.random.default_rng(seed)
    images, w = rng.uniform(0.35, 0.65, (n, 4, 4, 1)), rng.normal(size=(16, classes))
    bias = -0.5 * w.sum(0)
    z = images.reshape(n, -1) @ w + bias
    labels = z.argmax(1)
    distances = {}
    for norm, dual in (("linf", 1), ("l2", 2)):
        distances[norm] = np.array(
            [
                min((z[i, y] - z[i, t]) / np.linalg.norm(w[:, y] - w[:, t], dual) for t in range(classes) if t != y)
                for i, y in enumerate(labels)
            ]
        )
    weights = (w.astype(np.float32), bias.astype(np.float32))
    keys = rng.integers(2**32, size=(n, 2), dtype=np.uint32)
    return Case(affine, weights, images.astype(np.float32), labels.astype(np.int32), keys), distances


def half_breaking(distances):
    """An eps in the widest gap near the median."""
    middle = np.sort(distances)[3:9]
    at = np.argmax(middle[1:] / middle[:-1])
    eps = float(np.sqrt(middle[at] * middle[at + 1]))
    assert np.abs(distances / eps - 1).min() > 0.05
    assert distances.max() < 0.35  # the box is as far away
    return eps


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize(
    "attack",
    [
        PGD("PGD-20", PGDSettings(20)),
        MIM(),
        APGD("ce"),
        APGD("dlr"),
        APGD("dlr-targeted"),
        FAB(),
        FAB(targeted=False),
    ],
    ids=["pgd", "mim", "apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "fab"],
)
def test_a_linear_model_is_broken_exactly_where_the_closed_form_says(attack, classes, norm):
    case, distances = linear(classes)
    eps = half_breaking(distances[norm])
    if isinstance(attack, PGD):  # a quarter of eps
        attack = PGD(attack.title, PGDSettings(20, 0.25 * eps))
    broken = np.zeros(len(case.images), bool)
    for rank in range(2, classes + 1 if attack.targeted else 3):
        broken |= case.end(attack, norm, eps, rank).found.broken
    np.testing.assert_array_equal(broken, distances[norm] < eps)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("classes", [2, 5])
def test_fab_finds_the_closed_form_distance_up_to_its_overshoot(classes, norm):
    case, distances = linear(classes)
    for eta, above in ((1.05, 6e-3), (1.0001, 2e-4)):
        found = case.end(FAB(targeted=False, minimal=True, eta=eta), norm, 0.01)
        ratio = found.closest / distances[norm]
        assert (ratio > 1 - 1e-5).all(), eta
        assert (ratio < 1 + above).all(), eta
        np.testing.assert_array_equal(found.found.broken, found.closest <= 0.01)


@pytest.mark.parametrize("classes", [2, 5])
def test_cw_comes_within_a_few_percent_of_the_closed_form_distance(classes):
    """With more classes it runs towards the runner-up, which need not have the nearest boundary."""
    case, distances = linear(classes)
    eps = half_breaking(distances["l2"])
    found = case.end(CWL2(iterations=300, rate=0.001), "l2", eps)
    closest = found.closest
    ratio = closest / distances["l2"]
    assert (ratio > 1 - 1e-5).all()
    assert (ratio < 1.03).mean() >= (1 if classes == 2 else 0.8)
    moved = np.linalg.norm((found.image - case.images).reshape(len(ratio), -1), axis=1)
    np.testing.assert_allclose(moved, closest, rtol=1e-4)
    assert (case.margins(found.image) <= 1e-6).all()
    np.testing.assert_array_equal(found.found.broken, closest <= eps)
    np.testing.assert_array_equal(found.found.adversarial[closest <= eps], found.image[closest <= eps])


# Any network


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    classes=st.sampled_from((2, 3, 4, 10, 100)),
    norm=st.sampled_from(NORMS),
    eps=st.floats(0, 1, width=32, allow_subnormal=False),
    n=st.integers(1, 7),
    shape=st.sampled_from(((1, 1, 1), (1, 1, 3), (2, 5, 1), (7, 3, 3), (6, 6, 3), (1, 9, 2))),
    seed=st.integers(0, 2**16),
)
@example(classes=2, norm="l2", eps=1.0, n=1, shape=(1, 1, 1), seed=0)
def test_what_is_found_is_within_the_threat_model_and_misclassified(attack, classes, norm, eps, n, shape, seed):
    case = small_network(n, shape, classes, seed)
    found = case.end(attack, norm, eps).found
    assert found.adversarial.shape == case.images.shape
    assert found.adversarial.dtype == case.images.dtype
    assert ((found.adversarial >= 0) & (found.adversarial <= 1)).all()  # so finite
    moves = (found.adversarial.astype(np.float64) - case.images).reshape(n, -1)
    assert (np.linalg.norm(moves, np.inf if norm == "linf" else 2, axis=1) <= eps + 1e-6).all()
    now, broken = case.margins(found.adversarial), found.broken
    assert (now[broken] <= 1e-5).all()
    np.testing.assert_array_equal(found.adversarial[~broken], case.images[~broken])


SHARED = small_network(6, (5, 3, 2), 4, 4)  # one shape, so that the tests below share their programs
assert SHARED.wrong.any()
assert not SHARED.wrong.all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
def test_without_a_radius_only_what_is_misclassified_is_broken(attack, norm):
    found = SHARED.end(attack, norm, 0.0).found
    np.testing.assert_array_equal(found.broken, SHARED.wrong)
    np.testing.assert_array_equal(found.adversarial, SHARED.images)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
def test_an_example_knows_nothing_of_the_others(attack, norm):
    """Its whole path is the same at another place, beside others, and beside rows that are not a number."""
    eps = 0.05 if norm == "linf" else 0.2
    here = SHARED.path(attack, norm, eps)
    rows = [4, 3, 0, 5, 4, 1]
    other = SHARED.rows(rows)
    other.images[[0, 5]] = np.nan
    there = other.path(attack, norm, eps)
    for a, b in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True):
        np.testing.assert_array_equal(a[:, rows[1:5]], b[:, 1:5])


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
def test_an_example_does_not_see_how_large_its_batch_is(attack):
    whole = SHARED.end(attack, "l2", 0.2).found
    part = SHARED.rows([1, 4]).end(attack, "l2", 0.2).found
    rows = [1, 4]
    np.testing.assert_allclose(whole.adversarial[rows], part.adversarial, atol=1e-6)
    np.testing.assert_array_equal(whole.broken[rows], part.broken)
    np.testing.assert_array_equal(whole.queries[rows], part.queries)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
def test_a_broken_example_rests_if_the_attack_lets_it(attack, norm):
    states = SHARED.path(attack, norm, 0.05 if norm == "linf" else 0.2)
    broken = states.found.broken
    assert not (broken[:-1] & ~broken[1:]).any()
    assert broken[:-1].any()
    if not attack.rests:
        assert (np.diff(states.found.queries, axis=0) > 0).all()
        return
    for leaf in jax.tree.leaves(states):
        np.testing.assert_array_equal(leaf[1:][broken[:-1]], leaf[:-1][broken[:-1]])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("attack", ["pgd", "mim", "apgd-ce", "apgd-t", "fab-t", "fab", "square", "cw", "bandits"])
def test_every_forward_pass_is_counted(attack, norm):
    attack, calls = ATTACKS[attack], []

    def counting(x):
        calls.append(x)
        return SHARED.network(SHARED.weights, x)

    images, labels = SHARED.images, SHARED.labels
    p = Problem(counting, ThreatModel(0.0, norm), images, SHARED.logits(), labels, labels, SHARED.keys)
    first, sampled = attack.sample(p)
    state = attack.start(p, first)
    assert not calls
    p = dataclasses.replace(p, keys=jax.random.wrap_key_data(SHARED.keys))
    jax.eval_shape(lambda state: advance(attack, p, state, jnp.int32(0), sampled), state)
    queries = SHARED.end(attack, norm, 0.0).found.queries
    np.testing.assert_array_equal(queries[~SHARED.wrong], attack.passes * len(calls))


def test_the_defaults_ask_what_they_say():
    assert 3 * Bandits().passes == 9999
    assert CWL2().passes == 9000
    assert [a.needs_gradient for a in (MIM(), CWL2(), Bandits())] == [True, True, False]
    assert [a.rests for a in (MIM(), CWL2(), Bandits())] == [True, False, True]


@pytest.mark.parametrize("norm", NORMS)
def test_one_program_serves_cross_entropy_and_targets(norm):
    eps = 0.05 if norm == "linf" else 0.2
    for attack, rank in ((APGD("ce", 6), 0), (APGD("dlr-targeted", 6, rounds=9), 3)):
        assert attack.program == APGD("by target", 6)
        apart, together = (SHARED.path(a, norm, eps, rank) for a in (attack, attack.program))
        for a, b in zip(jax.tree.leaves(apart), jax.tree.leaves(together), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert APGD("dlr").program == APGD("dlr")


# Logits on another scale


def on_a_grid(weights, x):
    """Logits rounded to multiples of 2^-10, so that scale and shift are exact; the gradient is the network's."""
    *layers, scale, shift = weights
    z = two_layers(layers, x)
    return scale * (z - lax.stop_gradient(z) + jnp.round(lax.stop_gradient(z) * 1024) / 1024) + shift


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "attack",
    [APGD("dlr", 10), FAB(steps=5), FAB(targeted=False, steps=5), Square(40)],
    ids=["apgd-dlr", "fab-t", "fab", "square"],
)
def test_scaled_and_shifted_logits_give_the_same_images(attack, norm):
    states = []
    for scale, shift in ((1, 0), (4, 0), (1, 16), (0.25, -8)):
        weights = (*SHARED.weights, np.float32(scale), np.float32(shift))
        case = dataclasses.replace(SHARED, network=on_a_grid, weights=weights)
        states.append(case.end(attack, norm, 0.08 if norm == "linf" else 0.3).found)
    assert states[0].broken.sum() > SHARED.wrong.sum()
    for state in states[1:]:
        np.testing.assert_array_equal(state.broken, states[0].broken)
        np.testing.assert_allclose(state.adversarial, states[0].adversarial, atol=1e-6)


# The new attacks, step by step


def test_mim_gathers_gradients_over_their_mean():
    case, _ = linear(2)
    for norm in NORMS:
        states = case.path(MIM(4, mu=0.5), norm, 0.0001)
        w = case.weights[0]
        way = (w[:, 1 - case.labels] - w[:, case.labels]).T
        unit = way / np.abs(way).mean(1, keepdims=True)  # of a linear model always the same
        for row, weight in ((1, 1.0), (2, 1.5), (3, 1.75)):
            standing = ~states.found.broken[row]
            np.testing.assert_allclose(
                states.momentum[row].reshape(12, -1)[standing], weight * unit[standing], rtol=2e-4, atol=1e-5
            )


def test_cw_halves_the_way_to_the_last_success_and_multiplies_by_ten_before_it():
    attack = CWL2(iterations=5, searches=7, rate=0.05)
    states = SHARED.path(attack, "l2", 0.1)
    for n in range(6):
        c, low, high = attack.c, 0.0, math.inf
        for search in range(attack.searches):
            last = 5 * (search + 1)  # the state after the search; the start's is 0
            assert float(states.c[last, n]) == pytest.approx(c, rel=1e-5)
            np.testing.assert_array_equal(states.c[last - 4 : last + 1, n], states.c[last, n])
            if states.reached[last, n]:
                high = c
            else:
                low = c
            c = (low + high) / 2 if high < math.inf else 10 * c


def test_cw_seeks_on_beyond_eps_and_claims_nothing_there():
    for norm in NORMS:
        end = SHARED.end(ATTACKS["cw"], norm, 1e-5)
        far = end.closest > 1e-5
        assert (far & np.isfinite(end.closest)).any()
        assert not end.found.broken[far].any()
        image = end.image[far & np.isfinite(end.closest)]
        assert (image != SHARED.images[far & np.isfinite(end.closest)]).any(axis=(1, 2, 3)).all()


def test_bandits_moves_a_tile_as_one():
    case = dataclasses.replace(SHARED, images=np.full_like(SHARED.images, 0.5))  # the box is far
    states = case.path(Bandits(3, tile=2), "linf", 0.1)
    assert states.prior.shape == (4, 6, 3, 2, 2)
    moves = states.x[-1] - case.images
    assert np.abs(moves).max() > 0.005
    for row in range(5):
        for column in range(3):
            np.testing.assert_array_equal(moves[:, row, column], moves[:, row // 2 * 2, column // 2 * 2])


def test_the_gradient_free_attacks_find_what_lies_well_within_the_ball():
    case, distances = linear(2)
    for norm in NORMS:
        eps = half_breaking(distances[norm])
        for attack in (Bandits(300, tile=1), Square(300)):
            broken = case.end(attack, norm, 1.5 * eps).found.broken
            assert broken[distances[norm] < eps].all(), (attack.name, norm)
            assert not broken[distances[norm] > 1.5 * eps].any(), (attack.name, norm)


def test_found_keeps_what_it_has_where_nothing_new_counts():
    images, labels, logits = SHARED.images, SHARED.labels, jnp.asarray(SHARED.logits())
    p = Problem(lambda x: x, ThreatModel(0.1), images, logits, labels, labels, SHARED.keys)
    found = Found.clean(p)
    np.testing.assert_array_equal(found.broken, SHARED.wrong)
    found = found.seen(p, images + 1, logits)
    np.testing.assert_array_equal(found.broken, SHARED.wrong)
    np.testing.assert_array_equal(np.any(found.adversarial != images, axis=(1, 2, 3)), SHARED.wrong)
    again = found.judged(p, images + 2, logits, jnp.zeros(6, bool), jnp.zeros_like(images))
    np.testing.assert_array_equal(again.adversarial, found.adversarial)
    for field, expected in (("queries", 2), ("gradients", 1), ("flat", 1)):
        np.testing.assert_array_equal(getattr(again, field), expected)


@pytest.mark.parametrize("draw", [normal, uniform])
def test_a_draw_hangs_on_its_own_key_alone(draw):
    keys = np.random.default_rng(0).integers(2**32, size=(500, 2), dtype=np.uint32)
    sampled = draw(keys, (3, 2))
    np.testing.assert_array_equal(draw(keys[7:9], (3, 2)), sampled[7:9])
    np.testing.assert_array_equal(draw(keys[:2], (4, 2))[:, :3], sampled[:2])
    other = draw(keys ^ np.asarray([0, 1], np.uint32), (3, 2))
    for a, b in ((sampled, other), (sampled[:-1], sampled[1:]), (sampled[:, 0], sampled[:, 1])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.1
    mean, std = (0.5, 12**-0.5) if draw is uniform else (0, 1)
    assert abs(sampled.mean() - mean) < 0.07 * std
    assert sampled.std() == pytest.approx(std, rel=0.05)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
def test_a_start_hangs_on_its_example_alone_and_is_float32(attack, norm, monkeypatch):
    rng = np.random.default_rng(2)
    images, logits = rng.random((9, 17, 16, 3), np.float32), rng.normal(size=(9, 4)).astype(np.float32)
    labels, keys = np.arange(9, dtype=np.int32) % 4, rng.integers(2**32, size=(9, 2), dtype=np.uint32)

    def start(rows, eps):
        threat = ThreatModel(eps, norm)
        p = Problem(lambda x: x, threat, *(a[rows] for a in (images, logits, labels, labels, keys)))
        first, sampled = attack.sample(p)
        return attack.start(p, first), sampled

    whole = start(slice(None), 0.1)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(whole)} <= {"float32", "int32", "bool"}
    for rows in (slice(0, 1), slice(3, 5), slice(8, 9)):
        jax.tree.map(lambda a, b, rows=rows: np.testing.assert_array_equal(a, b[rows]), start(rows, 0.1), whole)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # numbers of NumPy's are no floats to it
    for eps in (np.float64(0.1), jnp.asarray(0.1), np.float32(0.1)):
        again = start(slice(None), eps)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(again)} <= {"float32", "int32", "bool"}
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), again, whole)


@pytest.mark.parametrize("norm", NORMS)
def test_pgd_starts_anywhere_in_the_ball(norm):
    n = 2000
    keys = np.random.default_rng(1).integers(2**32, size=(n, 2), dtype=np.uint32)
    images, none = np.full((n, 1, 3, 1), 0.5, np.float32), np.zeros(n, np.int32)
    p = Problem(lambda x: x, ThreatModel(0.3, norm), images, np.zeros((n, 2), np.float32), none, none, keys)
    attack = PGD("PGD", PGDSettings(1, 0.3))
    moved = attack.start(p, attack.sample(p)[0]).x - images
    size = p.threat.length(moved)
    assert size.max() <= 0.3 + 1e-6
    assert np.mean(size <= 0.3 * 0.5 ** (1 / 3)) == pytest.approx(0.5, abs=0.04)
    assert abs(moved.mean(0)).max() < 0.02
    attack = PGD("PGD", PGDSettings(1, 0.3, random_start=False))
    np.testing.assert_array_equal(attack.start(p, attack.sample(p)[0]).x, images)


# The projection onto a hyperplane


def hyperplanes(infeasible):
    """Points of the box, normals with zeros in them, offsets within reach or beyond it, and the corner that way."""
    rng = np.random.default_rng(7)
    x = rng.uniform(size=(96, 8))
    x = np.where(rng.uniform(size=x.shape) < 0.25, np.round(x), x)  # some at an edge of the box
    normal = rng.normal(size=x.shape) * (rng.uniform(size=x.shape) < 0.7)
    normal[np.arange(8)[None] >= rng.integers(1, 9, 96)[:, None]] = 0  # fewer dimensions
    normal[np.arange(96), 0] = rng.choice([-1.0, 0.5], 96)
    x[:, 0] = rng.uniform(0.1, 0.9, 96)  # there is always room
    up = rng.uniform(size=96) < 0.5
    corner = np.where((normal > 0) == up[:, None], 1.0, 0.0)
    reach = (normal * (corner - x)).sum(1)  # the most that <normal, move> can be, that way
    share = rng.uniform(1.05, 3, 96) if infeasible else rng.uniform(0, 0.98, 96)
    return x, normal, (normal * x).sum(1) + share * reach, corner


def moves(norm, x, normal, offset):
    x, normal, offset = (jnp.asarray(a, jnp.float32) for a in (x, normal, offset))
    return np.asarray(jax.jit(lambda *a: to_hyperplane(ThreatModel(1.0, norm), *a))(x, normal, offset), np.float64)


@pytest.mark.parametrize("norm", NORMS)
def test_no_move_onto_the_hyperplane_is_shorter(norm):
    x, normal, offset, _ = hyperplanes(False)
    found = moves(norm, x, normal, offset)
    assert (x + found >= -1e-6).all()
    assert (x + found <= 1 + 1e-6).all()
    np.testing.assert_allclose((normal * (x + found)).sum(1), offset, atol=2e-6)
    for at, w, b, move in zip(x, normal, offset, found, strict=True):
        missing, box = b - w @ at, list(zip(-at, 1 - at, strict=True))
        if norm == "linf":  # variables: the move, and its length, which is the objective
            bounds = np.vstack([np.c_[np.eye(8), -np.ones(8)], np.c_[-np.eye(8), -np.ones(8)]])
            best = linprog(
                np.eye(9)[8], bounds, np.zeros(16), np.append(w, 0)[None], [missing], [*box, (0, None)], "highs"
            )
            length, least = np.abs(move).max(), best.fun
        else:
            best = minimize(
                lambda d: d @ d / 2,
                move * 0,
                jac=lambda d: d,
                bounds=box,
                constraints={"type": "eq", "fun": lambda d: w @ d - missing, "jac": lambda d: w},  # noqa: B023
                method="SLSQP",
                options={"ftol": 1e-14, "maxiter": 200},
            )
            length, least = np.linalg.norm(move), np.linalg.norm(best.x)
        assert best.success
        assert length == pytest.approx(least, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_out_of_reach_every_pixel_goes_to_its_helpful_edge(norm):
    x, normal, offset, corner = hyperplanes(True)
    found = moves(norm, x, normal, offset)
    np.testing.assert_allclose((x + found)[normal != 0], corner[normal != 0], atol=1e-6)
    np.testing.assert_array_equal(found[normal == 0], 0)


@pytest.mark.parametrize("norm", NORMS)
def test_a_normal_of_zero_moves_nothing(norm):
    x = np.random.default_rng(0).uniform(size=(3, 8))
    np.testing.assert_array_equal(moves(norm, x, np.zeros((3, 8)), np.array([0.0, 1.0, -1.0])), 0)


# Squares


@pytest.mark.parametrize("shape", [(32, 32, 3), (28, 40, 1), (2, 3, 1)])
@pytest.mark.parametrize("norm", NORMS)
def test_squares_halve_their_area_at_the_published_queries(shape, norm):
    h, w, _ = shape
    expected, share = [], 0.8
    for query in range(10_000):
        if query in (11, 51, 201, 501, 1001, 2001, 4001, 6001, 8001):
            share /= 2
        side = round(math.sqrt(share * h * w))
        if norm == "l2":
            side = max(side, 3) | 1
        expected.append(min(max(side, 1), h, w))
    assert Square(10_000).sides(shape, norm) == [0, *expected]


def bump(height, width):
    """Nested rectangles around the middle pixel: the k-th adds 1 / (k + 1)^2 wherever it is within the window."""
    values = np.zeros((height, width))
    for k in range(max(height // 2, width // 2) + 1):
        for row in range(height // 2 - k, height // 2 + k + 1):
            for column in range(width // 2 - k, width // 2 + k + 1):
                if 0 <= row < height and 0 <= column < width:
                    values[row, column] += 1 / (k + 1) ** 2
    return values / np.sqrt((values**2).sum())


@pytest.mark.parametrize("side", [2, 3, 4, 5, 6, 11, 29])
def test_the_pattern_of_a_square_is_a_bump_above_a_dent(side):
    upper = side // 2
    expected = np.zeros((side, side))
    expected[:upper] = bump(upper, side)
    expected[upper:] = -bump(side - upper, side)
    expected /= np.sqrt((expected**2).sum())
    found = pattern(side)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert np.linalg.norm(found) == pytest.approx(1)
    if side % 2 == 0:
        np.testing.assert_array_equal(found[:upper], -found[upper:])
