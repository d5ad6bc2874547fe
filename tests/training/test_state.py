import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from rst_jax import config as config_lib
from rst_jax.training.optimizer import make_optimizer, make_schedule

SGD = config_lib.from_dict(base.get_config()).optimizer


def rates(epochs, per_epoch, steps, **changes):
    schedule = make_schedule(dataclasses.replace(SGD, **changes), epochs, per_epoch)
    return [round(float(schedule(s)), 7) for s in steps]


def test_piecewise_drops_at_the_boundaries():
    assert rates(160, 196, [0, 80 * 196 - 1, 80 * 196, 120 * 196, 160 * 196 - 1]) == [0.1, 0.1, 0.01, 0.001, 0.001]


def test_multistep_drops_every_so_many_epochs():
    got = rates(90, 10, [0, 299, 300, 600, 899], schedule="multistep", decay_every=30, learning_rate=0.256)
    assert got == [0.256, 0.256, 0.0256, 0.00256, 0.00256]


def test_cosine_by_epoch_and_by_step():
    got = rates(100, 4, [0, 3, 200, 399], schedule="cosine")
    assert got == pytest.approx([0.1, 0.1, 0.05, 0.05 * (1 + np.cos(np.pi * 0.99))], abs=1e-6)
    got = rates(100, 4, [0, 2, 200, 400], schedule="cosine", unit="step")
    assert got == pytest.approx([0.1, 0.05 * (1 + np.cos(np.pi * 0.005)), 0.05, 0.0], abs=1e-6)


def test_linear_falls_to_0_and_with_a_warm_up_makes_a_cycle():
    got = rates(10, 10, [0, 25, 50, 75, 100], schedule="linear", unit="step", warmup_epochs=5)
    assert got == pytest.approx([0.0, 0.05, 0.1, 0.05, 0.0], abs=1e-6)


def test_warm_up_is_linear():
    assert rates(100, 10, [0, 10, 40, 49], schedule="cosine", warmup_epochs=5)[:3] == pytest.approx([0.02, 0.04, 0.1])
    assert rates(100, 10, [0, 25, 50], unit="step", warmup_epochs=5) == pytest.approx([0.0, 0.05, 0.1])


def test_every_epoch_of_a_schedule_begins_on_time():
    """Float32 division must not move a boundary by a step."""
    schedule = make_schedule(SGD, 160, 176)
    found = [float(schedule(e * 176)) for e in range(160)]
    np.testing.assert_allclose(found, [0.1] * 80 + [0.01] * 40 + [0.001] * 40, rtol=1e-5)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_pytorchs(nesterov):
    import torch

    rng = np.random.default_rng(0)
    theirs = torch.nn.Parameter(torch.tensor(rng.normal(size=5).astype(np.float32)))
    ours = jnp.asarray(theirs.detach().numpy())
    sgd = torch.optim.SGD([theirs], lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=nesterov)
    optimizer = make_optimizer(dataclasses.replace(SGD, nesterov=nesterov), lambda step: 0.1)
    state = optimizer.init(ours)
    for _ in range(4):
        g = rng.normal(size=5).astype(np.float32)
        theirs.grad = torch.tensor(g)
        sgd.step()
        updates, state = optimizer.update(jnp.asarray(g), state, ours)
        ours = ours + updates
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-5)
