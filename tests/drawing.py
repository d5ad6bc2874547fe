"""Untrained tickets for the tests of several rooms."""

import jax
import numpy as np

from rst_jax import subnet
from rst_jax.initializers import init_variables
from rst_jax.models import ModelSpec
from rst_jax.tickets.ticket import Origin, Ticket

SPEC = ModelSpec("resnet_digits", 10, (0.3,), (0.4,))
IMAGES = np.random.default_rng(0).uniform(size=(5, 8, 8, 1)).astype(np.float32)


def draw(ratio=0.1, seed=0, weight_init="signed_kaiming_constant", pattern="element"):
    model = SPEC.make()
    v = init_variables(model, (8, 8, 1), jax.random.key(seed), weight_init=weight_init, pattern=pattern)
    masks = subnet.masks(v["scores"], subnet.kept_counts(v["scores"], ratio))
    stats = jax.tree.map(lambda s: s + 0.1 * ratio, v["batch_stats"])
    origin = Origin(name=f"ratio-{ratio:g}", selection_robust=ratio)
    return Ticket.make(SPEC, (8, 8, 1), ratio, v["params"], masks, stats, origin=origin), v
