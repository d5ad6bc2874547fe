"""The step, the attack and predictions as an accelerator runs them, against a CPU's numbers.

`JAX_PLATFORMS=cuda,cpu pytest tests/test_accelerator.py` (or tpu,cpu) takes the accelerator; elsewhere its form of the
programs, looped and several steps a dispatch, is held against the CPU's, flat and one by one.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from rst_jax import subnet
from rst_jax.attacks import APGD, FAB, Square
from rst_jax.config import PGDSettings
from rst_jax.data.pipeline import Images
from rst_jax.evaluation.accuracy import paper_attack
from rst_jax.evaluation.batch import Attacker
from rst_jax.evaluation.cascade import Cascade, run
from rst_jax.evaluation.classifier import Classifier, of_module
from rst_jax.evaluation.evidence import Examples
from rst_jax.evaluation.programs import Programs
from rst_jax.initializers import init_variables
from rst_jax.models import ModelSpec
from rst_jax.runtime.mesh import make_mesh, replicate
from rst_jax.threat import ThreatModel
from rst_jax.training.state import TicketState
from rst_jax.training.step import Settings, make_train_step
from rst_jax.training.target import Scores

N, BATCH, STEPS = 48, 16, 3
THREAT = ThreatModel(8 / 255)
SGD = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9))
RNG = np.random.default_rng(0)
PIXELS, LABELS = RNG.integers(0, 256, (N, 16, 16, 3), np.uint8), RNG.integers(0, 10, N).astype(np.int32)
IDS = np.arange(N, dtype=np.int32)


def mesh_of(place: str) -> Mesh:
    return make_mesh((jax.devices("cpu") if place == "cpu" else jax.devices())[:1])


def network(dtype):
    return ModelSpec("wrn10_1", 10, (0.5,) * 3, (0.25,) * 3).make(dtype=dtype, param_dtype=dtype)


def start(dtype):
    """Made on the CPU, so that both places begin with the same bits."""
    with jax.default_device(jax.devices("cpu")[0]):
        v = init_variables(network(dtype), (16, 16, 3), jax.random.key(0))
        return jax.tree.map(np.asarray, v)


def searched(place, attack_steps, dtype):
    """The state after three steps."""
    mesh, v = mesh_of(place), start(dtype)
    settings = Settings(
        Scores(), THREAT, PGDSettings(attack_steps, 2 / 255), crop_padding=2, flip=True, unroll=place == "cpu"
    )
    many = place != "cpu"
    step = make_train_step(network(dtype), SGD, settings, mesh, batch_size=BATCH, rows=BATCH, many=many)
    state = TicketState(np.int32(0), v["params"], v["scores"], v["batch_stats"], SGD.init(v["scores"]))
    data = Images.of(PIXELS, LABELS, IDS, levels=255)
    kept, key = subnet.kept_counts(v["scores"], 0.3), np.asarray(jax.random.key_data(jax.random.key(3)))
    state, data, order, kept = replicate((state, data, IDS, kept), mesh)
    for first in [0] if many else range(0, N, BATCH):
        count = np.int32(STEPS if many else 1)
        state, metrics = step(state, data, order, np.int32(first), kept, key, count)
    assert int(state.step) == STEPS
    return jax.tree.map(np.asarray, (state, metrics))


@pytest.mark.slow
def test_three_search_steps_are_the_cpus():
    """In float64, since in float32 the sign of a gradient near 0 depends on the machine (TPUs have no float64)."""
    if jax.devices()[0].platform == "tpu":
        pytest.skip("float64 convolutions are not to be had on a TPU")
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        (there, _), (here, _) = (searched(place, 3, jnp.float64) for place in ("default", "cpu"))
    for name in ("scores", "batch_stats"):
        leaves = zip(jax.tree.leaves(getattr(there, name)), jax.tree.leaves(getattr(here, name)), strict=True)
        for a, b in leaves:
            assert a.dtype == np.float64
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_masks_weights_and_clean_steps_are_the_cpus_in_float32():
    with jax.default_matmul_precision("highest"):
        (there, _), (here, _) = (searched(place, 0, jnp.float32) for place in ("default", "cpu"))
    for a, b in zip(jax.tree.leaves(there.params), jax.tree.leaves(here.params), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(jax.tree.leaves(there.scores), jax.tree.leaves(here.scores), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4 * np.abs(b).max())
    kept = subnet.kept_counts(here.scores, 0.3)
    masks = []
    for place in ("default", "cpu"):
        scores = replicate(here.scores, mesh_of(place))
        masks.append(jax.tree.map(np.asarray, jax.jit(subnet.masks)(scores, kept)))
    for a, b in zip(*map(jax.tree.leaves, masks), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_pgd_20_and_predictions_are_the_cpus_in_float32():
    """Logits to rounding; a flag may differ where a sign did, which is rare."""
    v = start(jnp.float32)
    variables = {k: v[k] for k in ("params", "batch_stats")}
    images = PIXELS.astype(np.float32) / np.float32(255)
    key = np.asarray(jax.random.key_data(jax.random.key(5)))
    logits, robust = [], []
    with jax.default_matmul_precision("highest"):
        for place in ("default", "cpu"):
            mesh, apply = mesh_of(place), of_module(network(jnp.float32))
            programs = Programs(mesh, N)
            placed, predict = replicate(variables, mesh), programs.predict(apply)
            attack = paper_attack(programs, apply, THREAT, PGDSettings(20, 2 / 255), unroll=place == "cpu")
            adversarial = attack(placed, images, LABELS, IDS, key)
            assert not np.asarray(THREAT.violations(np.asarray(adversarial), images)).any()
            logits.append(np.asarray(predict(placed, images)))
            robust.append(np.argmax(np.asarray(predict(placed, adversarial)), -1) == LABELS)
    np.testing.assert_allclose(logits[0], logits[1], rtol=1e-4, atol=1e-4 * np.abs(logits[1]).max())
    assert (robust[0] != robust[1]).mean() <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_cascade_of_a_card_is_the_cpus_in_float32(norm):
    """A flag may differ where rounding decides, which is rare."""
    v, model = start(jnp.float32), network(jnp.float32)
    images = PIXELS.astype(np.float32) / np.float32(255)
    classifier = Classifier(of_module(model), {k: v[k] for k in ("params", "batch_stats")})
    threat = ThreatModel(2 / 255 if norm == "linf" else 0.15, norm)
    cascade = (APGD("ce", 10), APGD("dlr-targeted", 10, rounds=2), FAB(steps=5, rounds=2), Square(100))
    found = []
    for place in ("default", "cpu"):
        programs = Programs(mesh_of(place), BATCH)
        if place == "default":
            programs.one_by_one = lambda *_: False  # loops, as on an accelerator
        logits = programs.logits(classifier, images, N)
        examples = Examples(images, np.argmax(logits, -1).astype(np.int32), IDS, logits)
        attacker = Attacker(programs, classifier, examples, np.zeros(2, np.uint32))
        found.append(run(attacker, Cascade("all", cascade, threat)))
    there, here = found
    assert 5 <= here.standing.sum() <= N - 5
    assert (there.standing != here.standing).mean() <= 0.05
    both = (there.attack == here.attack) & (there.queries == here.queries)
    assert both.mean() >= 0.8
    assert there.unverified.sum() == here.unverified.sum() == 0
