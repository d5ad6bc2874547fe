"""Draw a ticket from a Flax module of one's own, and set it beside a random mask of the same ratio.

    python examples/own_module.py

Any Flax Linen module will do that takes images [N, H, W, C] and `train`, gives logits [N, classes], and calls the
weights that are to be masked "kernel". Prints both accuracies on the 360 test digits; half a minute on two cores.
"""

import tempfile
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np

from rst_jax import subnet
from rst_jax.config import Attack, Config, Evaluate, Optimizer
from rst_jax.data import load_dataset
from rst_jax.data.feed import Feed
from rst_jax.evaluation.accuracy import Evaluator
from rst_jax.initializers import init_variables, sample_scores
from rst_jax.runtime.mesh import make_mesh
from rst_jax.threat import ThreatModel
from rst_jax.training.loop import Job, Trainer
from rst_jax.training.metrics import MetricsWriter
from rst_jax.training.target import Scores

RATIO = 0.3


class Net(nn.Module):
    """Two convolutions and two dense layers, with a normalisation that needs no batch."""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Images [N, 8, 8, 1] in [0, 1] to logits [N, 10]."""
        x = images - 0.3
        for features in (32, 64):
            x = nn.Conv(features, (3, 3), strides=2, use_bias=False)(x)
            x = nn.relu(nn.GroupNorm(8)(x))
        x = nn.relu(nn.Dense(256, use_bias=False)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10, use_bias=False)(x)


def main() -> None:
    """Search, then measure the ticket and the random mask."""
    config = Config(
        dataset="digits",
        holdout=157,
        crop_padding=0,
        flip=False,
        threat=ThreatModel(0.12),
        attack=Attack(steps=3, step_size=0.06),
        batch_size=64,
        epochs=15,
        optimizer=Optimizer(learning_rate=0.5, schedule="cosine", unit="step"),
        evaluate=Evaluate(step_size=0.012),
    )
    data, mesh, net = load_dataset(config), make_mesh(jax.devices()[:1]), Net()
    keys = {
        name: np.asarray(jax.random.key_data(jax.random.key(k))) for k, name in enumerate(("order", "step", "test"))
    }
    variables = init_variables(net, (8, 8, 1), jax.random.key(0))
    kept = subnet.kept_counts(variables["scores"], RATIO)
    evaluator = Evaluator(net, config, mesh, keys["test"])

    def accuracies(scores: dict, stats: dict, split_name: str) -> tuple[float, float]:
        weights = subnet.apply_masks(variables["params"], subnet.masks(scores, kept))
        network = {"params": weights, "batch_stats": stats}
        return evaluator.accuracies(network, getattr(data, split_name))

    with tempfile.TemporaryDirectory() as folder:  # checkpoints and metrics; keep it to go on after a stop
        workdir = Path(folder)
        trainer = Trainer(config, net, Feed(data.train, 64, mesh, keys), workdir, MetricsWriter(workdir), print)
        job = Job("mine", Scores(), config.epochs, config.optimizer)
        best = trainer.run(job, variables, kept, lambda s: accuracies(s.scores, s.batch_stats, "holdout"))
    random = sample_scores(jax.random.key(9), variables["params"], "element")
    for name, scores in (("ticket", best.state.scores), ("random mask", random)):
        natural, robust = accuracies(scores, best.state.batch_stats, "test")
        attack = f"{evaluator.attack_record.name} at eps {evaluator.attack_record.eps}"
        print(f"{name}, ratio {RATIO}: {100 * natural:.1f} % natural, {100 * robust:.1f} % {attack}")


if __name__ == "__main__":
    main()
