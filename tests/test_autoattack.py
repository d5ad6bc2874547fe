"""The authors' attacks, recorded step by step in float64 (benchmarks/autoattack_traces.py), met by ours."""

import dataclasses
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from rst_jax.attacks.apgd import APGD, checkpoints
from rst_jax.attacks.attack import Problem, advance, ranked
from rst_jax.attacks.fab import FAB
from rst_jax.attacks.square import Proposal, Square, pattern
from rst_jax.losses import correct, dlr, margin, targeted_dlr
from rst_jax.threat import ThreatModel

TOLERANCE = dict(rtol=0, atol=1e-10)
CHECKS = [steps - 1 for steps in checkpoints(100)]  # the steps that end with a look at the step size
RUNS = {f"{norm}-{loss}": (norm, loss) for norm in ("linf", "l2") for loss in ("ce", "dlr", "dlr-targeted")}
RUNS["wrapped"] = ("linf", "dlr")


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@cache
def traces():
    found = {}
    for name, value in np.load(Path(__file__).parent / "autoattack_traces.npz").items():
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
    targets = ranked(network(images), rank)
    keys = jax.random.split(jax.random.key(0), len(labels))
    return Problem(network, ThreatModel(float(traces()[name]["eps"]), norm), images, labels, targets, keys)


def walk(p, step, state, steps):
    """The last state, every state after a step [steps, ...], and every image that was looked at, in order."""
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
            state = step(q, state, i)
            return state, state

        return lax.scan(body, state, jnp.arange(steps, dtype=jnp.int32))

    last, every = program(state)
    jax.effects_barrier()
    return last, every, np.stack(seen)


def first(images):
    """[N, H, W, C, time] as [time, N, H, W, C]."""
    return np.moveaxis(images, -1, 0)


def apgd(run, faithful):
    """The recorded run, our attack, its problem, and its start from the recorded noise."""
    norm, loss = RUNS[run]
    t, p = traces()[f"apgd-{run}"], problem(f"apgd-{run}", norm)
    attack = APGD(loss, rho=float(t["rho"]), faithful=faithful)
    return t, attack, p, attack.start(p, noise=jnp.asarray(t["noise"]))


@pytest.mark.parametrize("run", RUNS)
def test_apgd_is_theirs_at_every_step(run):
    t, attack, p, start = apgd(run, faithful=True)
    last, every, seen = walk(p, attack.step, start, 100)
    sizes = np.concatenate([start.size[None], every.size])
    halved = t["sizes"][1:] < t["sizes"][:-1]
    assert set(np.flatnonzero(halved.any(1))) <= set(CHECKS)
    np.testing.assert_array_equal(sizes[1:] < sizes[:-1], halved)
    np.testing.assert_allclose(sizes, t["sizes"], rtol=1e-14)
    np.testing.assert_allclose(np.concatenate([start.x[None], seen]), first(t["x"]), **TOLERANCE)
    np.testing.assert_allclose(np.concatenate([start.best_loss[None], every.loss]), t["losses"], **TOLERANCE)
    np.testing.assert_allclose(last.best, t["best"], **TOLERANCE)
    np.testing.assert_array_equal(~every.found.broken, t["robust"][1:])
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
    np.testing.assert_array_equal(
        begin.found.queries, 2 if default.loss == "ce" else 1
    )  # the logits' size takes a pass
    begin = begin._replace(found=start.found)
    same(begin._replace(loss=start.loss), start)
    _, theirs, _ = walk(p, published.step, start, 100)
    # With 0 in place of the first loss, nothing differs where no logits are divided and nothing rests.
    same(walk(p, default.step, begin._replace(loss=start.loss), 100)[1], theirs)
    # With that loss, the first step may count otherwise, which tells at the first checkpoint.
    _, ours, _ = walk(p, default.step, begin, 100)
    until = jax.tree.map(lambda a: a[: CHECKS[0]], ours)
    counted = (ours.loss[0] > begin.loss).astype(jnp.int32) - (ours.loss[0] > 0).astype(jnp.int32)
    same(until._replace(increases=until.increases - counted), jax.tree.map(lambda a: a[: CHECKS[0]], theirs))
    checked = ours.size[CHECKS[0]] != theirs.size[CHECKS[0]]
    assert checked.any() == (run == "wrapped")
    assert (counted != 0)[checked].all()
    # A broken example rests at its first misclassified image.
    last, every, seen = walk(p, lambda p, s, i: advance(default, p, s, i), begin, 100)
    broken = np.asarray(every.found.broken)
    steps = np.where(broken.any(0), broken.argmax(0) + 1, 100)
    np.testing.assert_array_equal(last.found.queries, 1 + steps)  # one for the start
    for row in np.flatnonzero(broken.any(0)):
        np.testing.assert_allclose(last.found.adversarial[row], seen[steps[row] - 1, row], **TOLERANCE)
    assert broken.any()


def test_the_default_divides_large_logits():
    """So that the clean margin is 10; then it is the published attack on a network with such logits."""
    t, attack, p, _ = apgd("linf-ce", faithful=False)
    hot = dataclasses.replace(p, logits_fn=lambda x: 1000 * network(x))
    scale = jnp.maximum(margin(hot.logits_fn(p.images), p.labels) / 10, 1)
    assert (scale > 1).all()
    cold = dataclasses.replace(p, logits_fn=lambda x: hot.logits_fn(x) / scale[:, None])
    begin = attack.start(hot, noise=jnp.asarray(t["noise"]))
    _, ours, seen = walk(hot, attack.step, begin._replace(loss=jnp.zeros_like(begin.loss)), 100)
    published = APGD("ce", faithful=True)
    _, theirs, expected = walk(cold, published.step, published.start(cold, noise=jnp.asarray(t["noise"])), 100)
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
    last, every, seen = walk(p, attack.step, attack.start(p), 100)
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
    corners = jnp.asarray(np.repeat(t["corners"][:, None], n, 1), jnp.int32)  # one place for all examples
    upright = jnp.asarray(np.repeat(t["upright"][:, None], n, 1))
    drawn = Proposal(corners[..., :2], corners[..., 2:], jnp.asarray(t["signs"], p.images.dtype), upright)
    start = square.start(p, noise=jnp.asarray(t["noise"]))
    np.testing.assert_allclose(start.best, t["start"], **TOLERANCE)
    np.testing.assert_allclose(start.margin, t["start_margin"], **TOLERANCE)

    def proposed(p, state, i):
        return square.step(p, state, i, proposal=jax.tree.map(lambda a: a[i], drawn))

    injected = SimpleNamespace(rests=True, step=proposed)
    last, every, seen = walk(p, lambda p, s, i: advance(injected, p, s, i), start, queries)
    images = np.concatenate([start.best[None], every.best])
    accepted = np.max(np.abs(images[1:] - images[:-1]), axis=(2, 3, 4)) > 1e-12  # less is a proposal to stay
    np.testing.assert_array_equal(accepted, t["accepted"])
    np.testing.assert_allclose(images[1:][accepted], t["images"], **TOLERANCE)
    margins = jax.vmap(lambda x: margin(network(x), p.labels))(jnp.asarray(seen))
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
