"""Accuracy of trained networks on whole splits, clean and under attack.

Adversarial images are made by one compiled program and judged by another, in float32 at the highest matmul
precision; the evaluator checks the ball and the box itself, and an image outside them is not counted as an attack.
"""

from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from rst_jax.config import Config
from rst_jax.data import Dataset, Split
from rst_jax.mesh import fetch, on_cpu, replicate, split_rows
from rst_jax.metrics import progress
from rst_jax.records import AttackRecord, TicketRecord, accuracy, provenance
from rst_jax.step import make_attack_step, make_predict_step
from rst_jax.threat import ThreatModel
from rst_jax.ticket import Ticket

Tree = Any


class Evaluator:
    """PGD and prediction over whole splits in padded batches, compiled once for all networks of one shape.

    Args:
      model: a Flax module, computing in float32.
      config: for the threat model and the evaluation attack.
      mesh: all devices.
      key: key data, uint32 [2]; each example's start follows from its id.
    """

    def __init__(self, model: nn.Module, config: Config, mesh: Mesh, key: np.ndarray):
        self.mesh, self.key, self.threat = mesh, key, ThreatModel(config.threat.eps, config.threat.norm)
        e = config.evaluate
        self.batch_size = -(-e.batch_size // mesh.size) * mesh.size
        self.attack_record = AttackRecord(
            f"PGD-{e.steps}", config.threat.norm, config.threat.eps, e.steps, e.step_size, 1, config.seed
        )
        unroll = config.unroll == "unroll" or (config.unroll == "auto" and on_cpu(mesh))
        self._attack = make_attack_step(model, self.threat, mesh, steps=e.steps, step_size=e.step_size, unroll=unroll)
        self._predict = make_predict_step(model, mesh)
        self._violations = jax.jit(self.threat.violations)

    def _batched(self, run: Any, arrays: tuple[np.ndarray, ...], label: str) -> np.ndarray:
        """run(*rows) over all rows, padded to whole batches with zeros, which are cut off again."""
        n, size, outputs = len(arrays[0]), self.batch_size, []
        with jax.default_matmul_precision("highest"), progress(n, 0, label, "image") as bar:
            for first in range(0, n, size):
                rows = [a[first : first + size] for a in arrays]
                rows = [np.concatenate([r, np.zeros((size - len(r), *r.shape[1:]), r.dtype)]) for r in rows]
                outputs.append(fetch(run(*(split_rows(r, self.mesh) for r in rows))))
                bar.update(min(size, n - first))
        return np.concatenate(outputs)[:n]

    def logits(self, variables: Tree, images: np.ndarray) -> np.ndarray:
        """Logits [N, classes] of float32 images [N, H, W, C]."""
        placed = replicate(variables, self.mesh)
        return self._batched(lambda x: self._predict(placed, x), (images,), "predict")

    def correct(self, variables: Tree, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Which images are classified right: bool [N]; logits that are not finite are wrong."""
        logits = self.logits(variables, images)
        return (np.argmax(logits, -1) == labels) & np.all(np.isfinite(logits), -1)

    def attack(
        self, variables: Tree, images: np.ndarray, labels: np.ndarray, ids: np.ndarray
    ) -> tuple[np.ndarray, int]:
        """Adversarial images [N, H, W, C], and how many left the ball or the box; those are the clean ones again."""
        placed = replicate(variables, self.mesh)
        adversarial = self._batched(
            lambda x, y, i: self._attack(placed, x, y, i, self.key), (images, labels, ids), self.attack_record.name
        )
        outside = np.asarray(self._violations(adversarial, images))
        adversarial[outside] = images[outside]
        return adversarial, int(outside.sum())

    def accuracies(self, variables: Tree, dataset: Dataset, split: Split) -> tuple[float, float]:
        """Natural and robust accuracy on a split."""
        images = dataset.scaled(split)
        adversarial, _ = self.attack(variables, images, split.labels, split.ids)
        natural, robust = (self.correct(variables, x, split.labels) for x in (images, adversarial))
        return float(natural.mean()), float(robust.mean())


def ticket_record(
    ticket: Ticket, attack: AttackRecord, natural: np.ndarray, robust: np.ndarray, violations: int
) -> TicketRecord:
    """The record of a ticket from its per-example flags on the test images, bool [N] each."""
    kept, total = ticket.weight_counts
    return TicketRecord(
        name=ticket.meta["name"],
        remaining_ratio=ticket.remaining_ratio,
        weights_kept=kept,
        weights_total=total,
        natural=accuracy(natural),
        robust=accuracy(robust),
        violations=violations,
        attack=attack,
        dataset=ticket.meta["dataset"],
        model=ticket.model["name"],
        precision="float32, highest matmul precision",
        selected_on=ticket.meta["selected_on"],
        best_epoch=ticket.meta["epoch"],
        seed=ticket.meta["seed"],
        digest=ticket.digest,
        provenance=provenance(),
    )
