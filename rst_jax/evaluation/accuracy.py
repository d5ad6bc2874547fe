"""Accuracy of trained networks on whole splits, clean and under attack.

Adversarial images are made by one compiled program and judged by another, in float32 at the highest matmul
precision; the evaluator checks the ball and the box itself, and an image outside them is not counted as an attack.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rst_jax.attacks import pgd
from rst_jax.config import Config, PGDSettings
from rst_jax.data import Dataset, Split, prefetched
from rst_jax.data.pipeline import example_keys
from rst_jax.losses import correct
from rst_jax.records import PRECISION, AttackRecord, TicketRecord, accuracy, provenance
from rst_jax.runtime.mesh import AXIS, fetch, on_cpu, replicate, split_rows
from rst_jax.runtime.progress import progress
from rst_jax.threat import ThreatModel
from rst_jax.tickets.ticket import Ticket

Tree = Any
_AHEAD = 2  # batches read before they are needed


@dataclasses.dataclass(frozen=True)
class Judged:
    """A batch of n images attacked through one network and judged by K.

    Attributes:
      natural: the attacked network is right on the clean image: bool [n].
      robust: network k is right on the adversarial image: bool [K, n].
      violations: adversarial images that left the ball or the box; they are the clean ones again.
      adversarial: float32 [n or more, H, W, C] on the devices; rows from n on are padding.
    """

    natural: np.ndarray
    robust: np.ndarray
    violations: int
    adversarial: jax.Array


class Evaluator:
    """PGD and prediction over whole splits in padded batches, compiled once for all networks of one shape.

    Args:
      model: a Flax module, computing in float32.
      config: for the threat model and the evaluation attack.
      mesh: all devices.
      key: key data, uint32 [2]; each example's start follows from its id.
    """

    def __init__(self, model: nn.Module, config: Config, mesh: Mesh, key: np.ndarray):
        self.mesh, self.key, self.threat = mesh, key, config.threat
        e = config.evaluate
        self.batch_size = -(-e.batch_size // mesh.size) * mesh.size
        self.attack_record = AttackRecord(
            f"PGD-{e.steps}", config.threat.norm, float(config.threat.eps), e.steps, e.step_size, 1, config.seed
        )
        unroll = config.unroll == "unroll" or (config.unroll == "auto" and on_cpu(mesh))
        self._attack = make_attack_step(model, self.threat, e.pgd, mesh, unroll=unroll)
        self._predict = make_predict_step(model, mesh)
        self._check = jax.jit(self._checked, out_shardings=NamedSharding(mesh, PartitionSpec(AXIS)))

    def _checked(self, adversarial: jax.Array, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Adversarial images, the clean one where the threat model was left, and where that is."""
        outside = self.threat.violations(adversarial, images)
        return jnp.where(outside[:, None, None, None], images, adversarial), outside

    def _place(self, rows: np.ndarray) -> jax.Array:
        """At most a batch of rows, padded to a whole one with zeros, on the devices."""
        padding = np.zeros((self.batch_size - len(rows), *rows.shape[1:]), rows.dtype)
        return split_rows(np.concatenate([rows, padding]), self.mesh)

    def logits(self, variables: Tree, images: np.ndarray) -> np.ndarray:
        """Logits [N, classes] of float32 images [N, H, W, C]."""
        placed, size = replicate(variables, self.mesh), self.batch_size
        with jax.default_matmul_precision("highest"):
            batches = [images[first : first + size] for first in range(0, len(images), size)]
            return np.concatenate([fetch(self._predict(placed, self._place(rows)))[: len(rows)] for rows in batches])

    def judged(self, attacked: Tree, judges: Sequence[Tree], dataset: Dataset, split: Split) -> Iterator[Judged]:
        """Attack the images of a split through one network and let others judge, batch after batch.

        While a batch is on the devices the next is read, so that no more than a few are ever in memory.

        Args:
          attacked: the variables of the network to attack.
          judges: the variables of the networks that classify.
          dataset: what the split is of.
          split: images, labels, and the ids that the attack's random starts follow from.
        """
        attacked, judges = replicate(attacked, self.mesh), [replicate(v, self.mesh) for v in judges]
        n, size = len(split), self.batch_size
        batches = prefetched((split.batch(slice(first, first + size)) for first in range(0, n, size)), _AHEAD)
        with contextlib.closing(batches), progress(n, 0, self.attack_record.name, "image") as bar:
            for batch in batches:
                yield self._judge(attacked, judges, *batch)
                bar.update(len(batch[0]))

    def _judge(
        self, attacked: Tree, judges: list[Tree], images: np.ndarray, labels: np.ndarray, ids: np.ndarray
    ) -> Judged:
        with jax.default_matmul_precision("highest"):
            x = self._place(images)
            adversarial = self._attack(attacked, x, self._place(labels), self._place(ids), self.key)
            adversarial, outside = self._check(adversarial, x)
            logits = [self._predict(attacked, x), *(self._predict(v, adversarial) for v in judges)]
            logits, outside = fetch((logits, outside))
        natural, *robust = (correct(each[: len(labels)], labels) for each in logits)
        return Judged(natural, np.stack(robust), int(outside[: len(labels)].sum()), adversarial)

    def accuracies(self, variables: Tree, dataset: Dataset, split: Split) -> tuple[float, float]:
        """Natural and robust accuracy on a split."""
        flags = [(batch.natural, batch.robust[0]) for batch in self.judged(variables, [variables], dataset, split)]
        natural, robust = (np.concatenate(batches) for batches in zip(*flags, strict=True))
        return float(natural.mean()), float(robust.mean())


def ticket_record(
    ticket: Ticket, attack: AttackRecord, natural: np.ndarray, robust: np.ndarray, violations: int
) -> TicketRecord:
    """The record of a ticket from its per-example flags on the test images, bool [N] each."""
    kept, total = ticket.weight_counts
    return TicketRecord(
        name=ticket.name,
        remaining_ratio=ticket.remaining_ratio,
        weights_kept=kept,
        weights_total=total,
        natural=accuracy(natural),
        robust=accuracy(robust),
        violations=violations,
        attack=attack,
        dataset=ticket.origin.dataset,
        model=ticket.model.name,
        precision=PRECISION,
        selected_on=ticket.origin.selected_on,
        best_epoch=ticket.origin.epoch,
        seed=ticket.origin.seed,
        digest=ticket.digest,
        provenance=provenance(),
        kind=ticket.kind,
    )


def make_attack_step(
    model: nn.Module, threat: ThreatModel, settings: PGDSettings, mesh: Mesh, *, unroll: bool
) -> Callable[..., jax.Array]:
    """Compiled PGD on a trained network: `attack(variables, images, labels, ids, key) -> adversarial images`.

    One uniform start an example, from its id; an example rests once it is misclassified (paper). The variables
    are replicated, the rest is split by rows over the mesh; padding rows may hold anything.
    """

    def attack(variables: Tree, images: jax.Array, labels: jax.Array, ids: jax.Array, key: jax.Array) -> jax.Array:
        noise = threat.noise(example_keys(jax.random.wrap_key_data(key), ids), images)
        return pgd(
            lambda x: model.apply(variables, x, train=False),
            images,
            labels,
            threat,
            settings=settings,
            start=noise,
            rest_when_broken=True,
            unroll=unroll,
        )

    rows, replicated = PartitionSpec(AXIS), PartitionSpec()
    specs = (replicated, rows, rows, rows, replicated)
    return jax.jit(jax.shard_map(attack, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False))


def make_predict_step(model: nn.Module, mesh: Mesh) -> Callable[..., jax.Array]:
    """Compiled logits of a trained network: `predict(variables, images) -> [N, classes]`, split by rows."""
    rows, replicated = PartitionSpec(AXIS), PartitionSpec()
    return jax.jit(
        jax.shard_map(
            lambda variables, images: model.apply(variables, images, train=False),
            mesh=mesh,
            in_specs=(replicated, rows),
            out_specs=rows,
            check_vma=False,
        )
    )
