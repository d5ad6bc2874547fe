"""The authors' attacks, recorded step by step in float64 (benchmarks/autoattack_traces.py), met by ours."""

import dataclasses
import functools
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from rst_jax.attacks.apgd import APGD, checkpoints
from rst_jax.attacks.attack import Problem, advance
from rst_jax.attacks.fab import FAB
from rst_jax.attacks.square import Square, pattern
from rst_jax.losses import correct, dlr, margin, targeted_dlr
from rst_jax.threat import ThreatModel

TOLERANCE = dict(rtol=0, atol=1e-10)
CHECKS = checkpoints(100)  # the passes that end with a look at the step size
RUNS = {f"{norm}-{loss}": (norm, loss) for norm in ("linf", "l2") for loss in ("ce", "dlr", "dlr-targeted")}
RUNS["wrapped"] = ("linf", "dlr")


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@cache
def traces():
    found = {}
    for name, value in np.load(Path(__file__).parents[1] / "golden" / "autoattack_traces.npz").items():
        part, entry = name.split("/")
        found.setdefault(part, {})[entry] = value
    return found


def network(x):
    weights = {name: jnp.asarray(value) for name, value in traces()["network"].items()}
    hidden = lax.conv_general_dilated(
        x - 0.5, weights["kernel"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jax.nn.relu(hidden + weights["bias"]).reshape(len(x), -1) @ weights["head"]


def problem(name, norm, rank=2):
    images = jnp.asarray(traces()["examples"]["images"])
    labels = jnp.asarray(traces()["examples"]["labels"], jnp.int32)
    logits = network(images)
    targets = lax.top_k(logits, rank)[1][:, -1] if rank else jnp.full(len(labels), -1)
    keys = jax.random.split(jax.random.key(0), len(labels))
    threat = ThreatModel(float(traces()[name]["eps"]), norm)
    return Problem(network, threat, images, logits, labels, targets.astype(jnp.int32), keys)


def walk(p, attack, state, sampled=(), step=None):
    """The last state, every state after a pass [passes, ...], and every image that was looked at, in order."""
    seen = []

    def watched(x):
        # As bits: the thread in which a callback runs knows nothing of float64.
        bits = lax.bitcast_convert_type(lax.stop_gradient(x), jnp.uint32)
        jax.debug.callback(lambda b: seen.append(np.array(b).view(np.float64)[..., 0]), bits, ordered=True)
        return p.logits_fn(x)

    q = dataclasses.replace(p, logits_fn=watched)

    @jax.jit
    def program(state):
        def body(state, i):
            state = (step or attack.step)(q, state, i, sampled)
            return state, state

        return lax.scan(body, state, jnp.arange(attack.passes, dtype=jnp.int32))

    last, every = program(state)
    jax.effects_barrier()
    return last, every, np.stack(seen)


def first(images):
    """[N, H, W, C, time] as [time, N, H, W, C]."""
    return np.moveaxis(images, -1, 0)


def apgd(run, faithful):
    """The recorded run, our attack, its problem, and its start from the recorded noise."""
    norm, loss = RUNS[run]
    t = traces()[f"apgd-{run}"]
    p = problem(f"apgd-{run}", norm, 2 if loss == "dlr-targeted" else None)
    attack = APGD(loss, rho=float(t["rho"]), faithful=faithful)
    return t, attack, p, attack.start(p, t["noise"])


@pytest.mark.parametrize("run", RUNS)
def test_apgd_is_theirs_at_every_step(run):
    t, attack, p, start = apgd(run, faithful=True)
    last, every, seen = walk(p, attack, start)
    halved = t["sizes"][1:] < t["sizes"][:-1]
    assert set(np.flatnonzero(halved.any(1)) + 1) <= set(CHECKS)
    np.testing.assert_array_equal(every.size[1:] < every.size[:-1], halved)
    np.testing.assert_allclose(every.size, t["sizes"], rtol=1e-14)
    np.testing.assert_allclose(seen, first(t["x"]), **TOLERANCE)
    np.testing.assert_allclose(every.best_loss[0], t["losses"][0], **TOLERANCE)
    np.testing.assert_allclose(every.loss[1:], t["losses"][1:], **TOLERANCE)
    np.testing.assert_allclose(last.best, t["best"], **TOLERANCE)
    np.testing.assert_array_equal(~every.found.broken[1:], t["robust"][1:])
    np.testing.assert_array_equal(last.found.broken, t["broken"])
    expected = np.where(t["broken"][:, None, None, None], t["adversarial"], p.images)
    np.testing.assert_allclose(last.found.adversarial, expected, **TOLERANCE)
    assert t["broken"].any()
    assert not t["broken"].all()
    assert (last.found.queries == 101).all()


def same(ours, theirs):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **TOLERANCE), ours, theirs)


@pytest.mark.parametrize("run", ["l2-ce", "wrapped"])
def test_the_default_differs_from_it_where_it_says(run):
    _, published, p, start = apgd(run, faithful=True)
    _, default, _, begin = apgd(run, faithful=False)
    same(begin, start)
    _, theirs, _ = walk(p, published, start)
    # With 0 in place of the first loss, nothing differs where no logits are divided and nothing rests.

    def without(p, s, i, sampled):
        s = default.step(p, s, i, sampled)
        return s._replace(loss=jnp.where(i == 0, 0, s.loss))

    same(walk(p, default, begin, step=without)[1], theirs)
    # With that loss, the first step may count otherwise, which tells at the first checkpoint.
    _, ours, _ = walk(p, default, begin)
    counted = (ours.loss[1] > ours.loss[0]).astype(jnp.int32) - (ours.loss[1] > 0).astype(jnp.int32)
    until, expected = (jax.tree.map(lambda a: a[1 : CHECKS[0]], states) for states in (ours, theirs))
    same(until._replace(increases=until.increases - counted), expected)
    checked = ours.size[CHECKS[0]] != theirs.size[CHECKS[0]]
    assert checked.any() == (run == "wrapped")
    assert (counted != 0)[checked].all()
    # A broken example rests at its first misclassified image.
    last, every, seen = walk(p, default, begin, step=functools.partial(advance, default))
    broken = np.asarray(every.found.broken)
    passes = np.where(broken.any(0), broken.argmax(0) + 1, 101)
    np.testing.assert_array_equal(last.found.queries, passes)
    for row in np.flatnonzero(broken.any(0)):
        np.testing.assert_allclose(last.found.adversarial[row], seen[passes[row] - 1, row], **TOLERANCE)
    assert broken.any()


def test_the_default_divides_large_logits():
    """So that the clean margin is 10; then it is the published attack on a network with such logits."""
    _, attack, p, begin = apgd("linf-ce", faithful=False)
    hot = dataclasses.replace(p, logits_fn=lambda x: 1000 * network(x), logits=1000 * p.logits)
    scale = jnp.maximum(margin(hot.logits, p.labels) / 10, 1)
    assert (scale > 1).all()
    cold = dataclasses.replace(p, logits_fn=lambda x: hot.logits_fn(x) / scale[:, None])

    def without(p, s, i, sampled):
        s = attack.step(p, s, i, sampled)
        return s._replace(loss=jnp.where(i == 0, 0, s.loss))

    _, ours, seen = walk(hot, attack, begin, step=without)
    _, theirs, expected = walk(cold, APGD("ce", faithful=True), begin)
    np.testing.assert_allclose(seen, expected, **TOLERANCE)
    np.testing.assert_allclose(ours.loss, theirs.loss, **TOLERANCE)
    np.testing.assert_array_equal(ours.found.broken, theirs.found.broken)


@pytest.mark.parametrize("rank", [2, 3, None])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fab_is_theirs_at_every_step(norm, rank):
    t = traces()[f"fab-{norm}-{rank or 'nearest'}"]
    p, attack = (
        problem(f"fab-{norm}-{rank or 'nearest'}", norm, rank or 2),
        FAB(targeted=rank is not None, minimal=True),
    )
    last, every, seen = walk(p, attack, attack.start(p))
    theirs = np.where(t["closest"] < 1e9, t["closest"], np.inf)
    np.testing.assert_allclose(every.closest, theirs, **TOLERANCE)
    if rank:  # a step looks at where it stands, then at where it went
        np.testing.assert_allclose(seen[1::2], first(t["x"]), **TOLERANCE)
    within = p.threat.distance(jnp.asarray(t["found"]), p.images) <= p.threat.eps
    broken = within & ~correct(network(jnp.asarray(t["found"])), p.labels)
    np.testing.assert_array_equal(last.found.broken, broken)
    expected = np.where(np.asarray(broken)[:, None, None, None], t["found"], p.images)
    # Once it has settled, rounding says which of several images, 1e-10 apart and equally far, is the closest.
    np.testing.assert_allclose(last.found.adversarial, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_square_is_theirs_at_every_query(norm):
    t, p = traces()[f"square-{norm}"], problem(f"square-{norm}", norm)
    queries, n = t["margins"].shape
    square = Square(steps=queries, faithful=True)
    # What must be sampled so that theirs follows; one place for all examples; the first pass has no proposal.
    room = np.asarray(p.images.shape[1:3]) - np.asarray(square.sides(p.images.shape[1:], norm))[1:, None]
    signs, corners = np.where(t["signs"] < 0, 0.25, 0.75), np.repeat(t["corners"][:, None], n, 1)
    places = (corners + 0.5) / np.tile(np.maximum(room, 1), (1, corners.shape[-1] // 2))[:, None]
    lies = np.where(np.repeat(t["upright"][:, None, None], n, 1), 0.25, 0.75) if norm == "l2" else places[..., :0]
    sampled = np.pad(np.concatenate([signs, places, lies], -1), ((1, 0), (0, 0), (0, 0))).swapaxes(0, 1)
    sampled = jnp.asarray(sampled, jnp.float32)
    last, every, seen = walk(p, square, square.start(p, t["noise"]), sampled, functools.partial(advance, square))
    np.testing.assert_allclose(every.best[0], t["start"], **TOLERANCE)
    np.testing.assert_allclose(every.margin[0], t["start_margin"], **TOLERANCE)
    accepted = np.max(np.abs(every.best[1:] - every.best[:-1]), axis=(2, 3, 4)) > 1e-12  # less is a proposal to stay
    np.testing.assert_array_equal(accepted, t["accepted"])
    np.testing.assert_allclose(every.best[1:][accepted], t["images"], **TOLERANCE)
    margins = jax.vmap(lambda x: margin(network(x), p.labels))(jnp.asarray(seen[1:]))
    alive = ~np.isnan(t["margins"])
    np.testing.assert_allclose(np.asarray(margins)[alive], t["margins"][alive], **TOLERANCE)
    np.testing.assert_array_equal(last.found.queries, t["counts"])
    np.testing.assert_array_equal(last.found.broken, t["counts"] < queries + 1)
    assert accepted.sum() > 20


def test_ratios_and_patterns_are_theirs():
    t = traces()["ratios"]
    logits = jnp.asarray(t["logits"])
    labels, targets = (jnp.asarray(t[name], jnp.int32) for name in ("labels", "targets"))
    for name, loss in (("dlr", lambda z: dlr(z, labels)), ("targeted", lambda z: targeted_dlr(z, labels, targets))):
        values, pull_back = jax.vjp(loss, logits)
        np.testing.assert_allclose(values, t[name], **TOLERANCE)
        np.testing.assert_allclose(pull_back(jnp.ones_like(values))[0], t[f"{name}_gradient"], **TOLERANCE)
    for side in range(1, 10):
        np.testing.assert_allclose(pattern(side), t[f"pattern{side}"], **TOLERANCE)
