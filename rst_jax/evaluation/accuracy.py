"""Accuracy of trained networks on whole splits, clean and under attack: the paper's measure.

One uniform start an example, which rests once it is misclassified; every image is counted. Batches, programs and
verification are those of the cards: what the attack claims is judged by another program at another batch size, in
float32 at the highest precision, and an image that is not finite or left ball or box (in float64) is an attack that
failed, never a robust example.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from rst_jax.attacks import pgd
from rst_jax.config import Config, PGDSettings
from rst_jax.data import Split, prefetched
from rst_jax.data.pipeline import example_keys
from rst_jax.evaluation.classifier import Apply, Classifier, of_module
from rst_jax.evaluation.programs import Programs, violations
from rst_jax.losses import correct
from rst_jax.records import PRECISION, AttackRecord, TicketRecord, accuracy, provenance
from rst_jax.runtime.mesh import fetch, on_cpu, replicate
from rst_jax.runtime.progress import Progress
from rst_jax.threat import ThreatModel
from rst_jax.tickets.ticket import Ticket

_AHEAD = 2  # batches read before they are needed


@dataclasses.dataclass(frozen=True)
class Judged:
    """A batch of n images attacked through one network and judged by K.

    Attributes:
      natural: the attacked network is right on the clean image: bool [n].
      robust: network k is right on the adversarial image, which is one: bool [K, n].
      violations: adversarial images that are not finite or left ball or box; they are the clean ones again.
      adversarial: float32 [n, H, W, C].
    """

    natural: np.ndarray
    robust: np.ndarray
    violations: int
    adversarial: np.ndarray


class Evaluator:
    """PGD and prediction over whole splits in padded batches, compiled once for all networks of one shape.

    Args:
      model: a Flax module, computing in float32.
      config: for the threat model and the evaluation attack.
      mesh: all devices.
      key: key data, uint32 [2]; each example's start follows from its id.
    """

    def __init__(self, model: nn.Module, config: Config, mesh: Mesh, key: np.ndarray):
        self.mesh, self.key, self.threat, e = mesh, key, config.threat, config.evaluate
        self.programs, self.apply = Programs(mesh, e.batch_size), of_module(model)
        self.attack_record = AttackRecord(
            f"PGD-{e.steps} (paper)", self.threat.norm, float(self.threat.eps), e.steps, e.step_size, 1, config.seed
        )
        unroll = config.unroll == "unroll" or (config.unroll == "auto" and on_cpu(mesh))
        self._attack = paper_attack(self.programs, self.apply, self.threat, e.pgd, unroll=unroll)

    def logits(self, variables: PyTree, images: np.ndarray) -> np.ndarray:
        """Logits [N, classes] of float32 images [N, H, W, C]."""
        return self.programs.logits(Classifier(self.apply, variables), images, len(images))

    def judged(self, attacked: PyTree, judges: Sequence[PyTree], split: Split) -> Iterator[Judged]:
        """Attack the images of a split through one network and let others judge, batch after batch.

        While a batch is on the devices the next is read, so that no more than a few are ever in memory.

        Args:
          attacked: the variables of the network to attack.
          judges: the variables of the networks that classify.
          split: images, labels, and the ids that the attack's random starts follow from.
        """
        attacked, *judges = (self.programs.placed(Classifier(self.apply, v)) for v in (attacked, *judges))
        n = len(split)
        size = self.programs.sizes(n)[-1]
        batches = prefetched((split.batch(slice(first, first + size)) for first in range(0, n, size)), _AHEAD)
        with contextlib.closing(batches), Progress(n, 0, self.attack_record.name, "images") as bar:
            for images, labels, ids in batches:
                adversarial = self.attacked(attacked, images, labels, ids, size)
                outside = violations(self.threat, adversarial, images)
                adversarial[outside] = images[outside]
                natural = correct(self.programs.logits(attacked, images, n), labels)
                said = [self.programs.logits(judge, adversarial, n, another=True) for judge in judges]
                robust = np.stack([correct(logits, labels) & ~outside for logits in said])
                yield Judged(natural, robust, int(outside.sum()), adversarial)
                bar.update(len(images))

    def attacked(
        self, classifier: Classifier, images: np.ndarray, labels: np.ndarray, ids: np.ndarray, size: int
    ) -> np.ndarray:
        """What the attack makes of images [n, H, W, C], padded to `size`; nothing is checked."""
        rows = [self.programs.place(each, size) for each in (images, labels, ids)]
        with jax.default_matmul_precision("highest"):
            adversarial = self._attack(classifier.variables, *rows, replicate(self.key, self.mesh))
        return np.array(fetch(adversarial)[: len(images)])

    def accuracies(self, variables: PyTree, split: Split) -> tuple[float, float]:
        """Natural and robust accuracy on a split."""
        flags = [(batch.natural, batch.robust[0]) for batch in self.judged(variables, [variables], split)]
        natural, robust = (np.concatenate(batches) for batches in zip(*flags, strict=True))
        return float(natural.mean()), float(robust.mean())


def paper_attack(
    programs: Programs, apply: Apply, threat: ThreatModel, settings: PGDSettings, *, unroll: bool
) -> Callable[..., jax.Array]:
    """Compiled PGD on a trained network: `attack(variables, images, labels, ids, key data) -> adversarial images`.

    One uniform start an example, from its id; an example rests once it is misclassified (paper). The variables and the
    key are replicated, the rest is split by rows over the mesh; padding rows may hold anything.
    """

    def attack(variables: PyTree, images: jax.Array, labels: jax.Array, ids: jax.Array, key: jax.Array) -> jax.Array:
        noise = threat.noise(example_keys(jax.random.wrap_key_data(key), ids), images)
        return pgd(
            lambda x: apply(variables, x),
            images,
            labels,
            threat,
            settings=settings,
            start=noise,
            rest_when_broken=True,
            unroll=unroll,
        )

    return programs.compile(("paper", apply, threat, settings, unroll), attack, "vrrrv", "r", "paper")


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
