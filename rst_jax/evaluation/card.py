"""The card: one classifier, many attacks, the evidence for every example, and a verdict on the whole.

    card = rst_jax.evaluate(logits_fn, images, labels, rst_jax.ThreatModel(8 / 255), attacks="autoattack")
    print(card)

A card's folder holds `card.json`; `examples.npz` (arrays over the examples, a cascade's under its name); `gallery.npz`,
a few images to look at; where they are kept, `adversarials.npz`; `question.json`, what was asked; and `rows/`, each
finished cascade and, until it is finished, its batches, from which the same call goes on.
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import numpy as np

from rst_jax.attacks.attack import Attack
from rst_jax.data.given import whole_labels
from rst_jax.evaluation.batch import Attacker
from rst_jax.evaluation.cascade import Cascade, run
from rst_jax.evaluation.checks import check_cascade, check_function, check_suite, check_sweep, verdict
from rst_jax.evaluation.classifier import LogitsFn, of_function
from rst_jax.evaluation.evidence import SHOWN, WRONG, Evidence, Examples, Images
from rst_jax.evaluation.images import ImageFile, write_images
from rst_jax.evaluation.programs import Programs, make_programs
from rst_jax.evaluation.question import Question, ask, check_given, examine, key_data
from rst_jax.evaluation.suites import described, make_suite
from rst_jax.records import PRECISION, CardRecord, CascadeRecord, Check, Curve, Sweep, accuracy, provenance, read_json
from rst_jax.reports.card import card_text
from rst_jax.runtime.files import write_arrays, write_json
from rst_jax.runtime.mesh import from_main, is_main
from rst_jax.runtime.paths import local_path
from rst_jax.threat import ThreatModel

_FRAGILE = 1e-4
_PROBED = 64  # images on which the function itself is looked at


@dataclasses.dataclass(frozen=True)
class Card:
    """A record and its evidence.

    Attributes:
      record: what goes to card.json.
      evidence: of each of the record's cascades.
      examples: what they are about.
    """

    record: CardRecord
    evidence: list[Evidence]
    examples: Examples

    def __str__(self) -> str:
        """The table for a terminal."""
        return card_text(self.record)

    def _gallery(self) -> dict[str, np.ndarray]:
        """The first examples that the cascade with most broken ones broke, to be looked at."""
        main = max(range(len(self.evidence)), key=lambda k: int((self.evidence[k].attack >= 0).sum()))
        found = self.evidence[main]
        return {
            "row": np.asarray(self.record.rows[main].name),
            "index": found.kept[:SHOWN],
            "clean": self.examples.read(found.kept[:SHOWN]),
            "adversarial": found.adversarial[:SHOWN],
        }

    def save(self, folder: Path) -> None:
        """Write card.json, examples.npz and gallery.npz."""
        arrays = {"id": self.examples.ids, "label": self.examples.labels, "clean_logits": self.examples.logits}
        for row, found in zip(self.record.rows, self.evidence, strict=True):
            told = {name: value for name, value in vars(found).items() if name not in ("adversarial", "kept")}
            arrays |= {f"{row.name}/{name}": value for name, value in told.items()}
        write_arrays(folder / "examples.npz", arrays)
        write_arrays(folder / "gallery.npz", self._gallery())
        write_json(folder / "card.json", self.record)


def evaluate(
    logits_fn: LogitsFn,
    images: Images,
    labels: np.ndarray,
    threat_model: ThreatModel,
    attacks: str | Attack | Sequence[str | Attack] = "autoattack",
    key: jax.Array | None = None,
    *,
    batch_size: int = 250,
    faithful: bool = False,
    eps_l2: float = 0.5,
    folder: str | Path | None = None,
    keep_images: bool = False,
    ids: np.ndarray | None = None,
    subject: str = "",
    dataset: str = "images",
) -> Card:
    """Measure a classifier's robustness, and how far the measure can be trusted.

    Args:
      logits_fn: float32 images [N, H, W, C] to logits [N, classes], the same whenever it is called; one that keeps
        arrays from call to call, such as a random key that it splits, is refused. A function that JAX cannot trace (a
        network of another library) is called with NumPy arrays; on it, and where JAX has no gradient, only attacks
        without gradients ("square", "bandits") can be run.
      images: float32 [n, H, W, C] in the threat model's box; an array, or anything with a length that gives such an
        array for an array of places, and is asked for a batch at a time. labels: whole numbers [n].
      threat_model: norm, eps, box.
      attacks: "autoattack", "full", or names of `suites.ATTACKS`, each of which makes a cascade ("pgd-20,square"); or a
        sequence of names and of attacks themselves.
      key: of all random samples, as `jax.random.key` makes them; `jax.random.key(0)` if not given.
      batch_size: examples a program takes at most. Results do not hang on it.
      faithful: keep the published attacks' quirks, for comparison with them.
      eps_l2: of the L2 cascades of "full".
      folder: where the card goes. Called again with the same arguments after a kill, the evaluation goes on from the
        last finished batch.
      keep_images: also keep all adversarial images, in the folder or, without one, in the evidence.
      ids: the examples' identities, different integers [n] that fit 32 bits; random samples follow from them. Their
        place if not given.
      subject, dataset: names for the card.

    Raises:
      ValueError: images, labels, ids, key, radius, logits or names that are not right, or a folder that holds another
        evaluation or is in use.
    """
    n, folder = len(images), None if folder is None else local_path(folder)
    images = np.asarray(images) if hasattr(images, "__array__") or isinstance(images, list | tuple) else images
    ids, some = np.arange(n) if ids is None else np.asarray(ids), np.asarray(images[np.arange(min(n, 2))])
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
    check_given(some, n, ids, threat_model)
    start = key_data(key)
    classifier = of_function(logits_fn, some)
    labels = whole_labels(np.asarray(labels), "labels", n, classifier.classes)
    classifier = dataclasses.replace(classifier, name=subject or classifier.name)
    hindered = classifier.obstacle
    suite = make_suite(attacks, threat_model, some.shape[1:], eps_l2=eps_l2, faithful=faithful, obstacle=hindered)
    programs = make_programs(classifier, batch_size)
    examples = examine(programs, classifier, images, labels, ids, threat_model)
    question = ask(programs, classifier, examples, threat_model, suite, start, dataset)
    return measure(programs, question, folder, keep_images)


def measure(programs: Programs, question: Question, folder: Path | None = None, keep_images: bool = False) -> Card:
    """Answer a question; the programs are kept for the next classifier of the same shape.

    Args:
      programs: compiled when first needed.
      question: all that is asked.
      folder, keep_images: as of `evaluate`.
    """
    attacker = Attacker(programs, question.classifier, question.examples, question.key)
    images = folder / "adversarials.npz" if folder else None
    keep = keep_images and not (images and images.exists())

    def ran(cascade: Cascade, keep: bool) -> Evidence:
        return run(attacker, cascade, folder / "rows" / cascade.folder if folder else None, keep)

    with question.claim(folder).held() if folder else contextlib.nullcontext():
        some = question.examples.read(np.arange(min(len(question.examples), _PROBED)))
        checks = check_function(question.classifier.raw, attacker.logits, some, question.threat)
        found = [ran(cascade, keep) for cascade in question.suite.cascades]
        curve = [ran(cascade, False) for cascade in question.suite.sweep]
        card = Card(_record(question, checks, found, curve), found, question.examples)
        if folder and is_main():
            files = [
                ImageFile(folder / "rows" / cascade.folder / "adversarial.npy") for cascade in question.suite.cascades
            ]
            if keep:
                _keep(folder / "adversarials.npz", question, found, files)
            for file in files:
                file.path.unlink(missing_ok=True)
            card.save(folder)
    return card


def finished(folder: Path, digest: str) -> bool:
    """Whether a folder holds the finished card of the classifier of that digest; seen alike by all processes."""
    there = False
    if is_main():
        with contextlib.suppress(ValueError):
            there = read_json(folder / "card.json", CardRecord).subject_digest == digest
    return bool(from_main(np.asarray(there)))


def _keep(path: Path, question: Question, found: list[Evidence], files: list[ImageFile]) -> None:
    """Write adversarials.npz from the files of the cascades."""
    names = [f"{cascade.name}/{cascade.threat.norm}" for cascade in question.suite.cascades]
    broken = [(e.attack >= 0, file) for e, file in zip(found, files, strict=True)]
    write_images(path, question.examples, dict(zip(names, broken, strict=True)))


def _record(question: Question, checks: list[Check], found: list[Evidence], curve: list[Evidence]) -> CardRecord:
    """What card.json holds; `checks` are those of the classifier alone."""
    examples, suite, threat = question.examples, question.suite, question.threat
    for cascade, evidence in zip(suite.cascades, found, strict=True):
        some = examples.first(cascade.examples)
        checks = checks + _named(cascade.name, check_cascade(cascade, evidence, some.logits, some.labels))
    checks = checks + check_suite(suite.cascades, found)
    n, eps = len(curve[0].attack), [0.0, *(float(cascade.threat.eps) for cascade in suite.sweep)]
    robust = [float(examples.right[:n].mean()), *(float(e.robust.mean()) for e in curve)]
    checks = checks + _named("sweep", check_sweep(eps, robust, n, *curve))
    attack = described(suite.sweep[0].attacks[0], examples.logits.shape[-1])
    return CardRecord(
        subject=question.classifier.name,
        subject_digest=question.subject_digest,
        dataset=question.dataset,
        images_digest=examples.digest,
        n=len(examples),
        box=question.box,
        mode=suite.mode,
        seed=question.seed,
        precision=PRECISION,
        clean=accuracy(examples.right),
        rows=[_cascade_record(c, e, examples) for c, e in zip(suite.cascades, found, strict=True)],
        sweep=Sweep(attack, threat.norm, eps, robust, n),
        checks=checks,
        verdict=verdict(checks),
        provenance=provenance(),
    )


def _named(cascade: str, checks: Iterable[Check]) -> list[Check]:
    return [dataclasses.replace(check, name=f"{cascade}: {check.name}") for check in checks]


def _cascade_record(cascade: Cascade, e: Evidence, examples: Examples) -> CascadeRecord:
    classes, ids = examples.logits.shape[-1], examples.ids[: len(e.attack)]
    rounds = [attack.rounds_of(classes) for attack in cascade.attacks]
    broken, attacked = e.attack >= 0, e.attack != WRONG
    median = float(np.median(e.closest[attacked])) if np.isfinite(e.closest).any() else np.inf
    spent = e.queries + e.gradients
    most = int(spent.max(initial=1))
    efforts = sorted({k * 10**p for p in range(9) for k in (1, 2, 5) if k * 10**p < most} | {most})
    several = len(rounds) == 1 and rounds[0] > 1

    def left(beaten: Iterable[np.ndarray]) -> list[float]:
        return [float((attacked & ~e.failed & ~(broken & early)).mean()) for early in beaten]

    return CascadeRecord(
        name=cascade.name,
        norm=cascade.threat.norm,
        eps=float(cascade.threat.eps),
        attacks=[described(attack, classes) for attack in cascade.attacks],
        rounds=rounds,
        robust=accuracy(e.robust),
        broken={attack.name: int((e.attack == k).sum()) for k, attack in enumerate(cascade.attacks)},
        unverified=int(e.unverified.sum()),
        failed=int((e.standing & e.failed).sum()),
        fragile=ids[broken & (np.abs(e.margin) < _FRAGILE)].tolist(),
        median_distance=median if np.isfinite(median) else None,
        queries=int(e.queries.sum()),
        gradients=int(e.gradients.sum()),
        over_passes=Curve(efforts, left(spent <= effort for effort in efforts)),
        over_rounds=Curve(list(range(1, rounds[0] + 1)), left(e.round < r + 1 for r in range(rounds[0])))
        if several
        else None,
    )
