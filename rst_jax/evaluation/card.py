"""The card: one classifier, many attacks, the evidence for every example, and a verdict on the whole.

    card = rst_jax.evaluate(logits_fn, images, labels, rst_jax.ThreatModel(8 / 255), attacks="autoattack")
    print(card)

A card's folder holds `card.json`; `examples.npz` (arrays over the examples, a row's under its name); `gallery.npz`, a
few images to look at; where they are kept, `adversarials.npz`; `question.json`, what was asked; and `rows/`, each
finished row and, until it is finished, its batches, from which the same call goes on.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rst_jax.evaluation.cascade import Driver, Row
from rst_jax.evaluation.checks import check_function, check_row, check_rows, check_sweep, verdict
from rst_jax.evaluation.classifier import Subject, check_question, key_data, of_function
from rst_jax.evaluation.evidence import WRONG, Evidence, Examples
from rst_jax.evaluation.suites import described, make_rows, sweep_rows
from rst_jax.losses import correct
from rst_jax.records import PRECISION, CardRecord, Check, Curve, RowRecord, Sweep, accuracy, digest, provenance
from rst_jax.reports.card_table import table
from rst_jax.runtime.files import read_arrays, write_arrays, write_json
from rst_jax.runtime.mesh import is_main, make_mesh
from rst_jax.runtime.workdir import Claim
from rst_jax.threat import ThreatModel
from rst_jax.tickets.ticket import Ticket

_FORMAT = 2
_FRAGILE = 1e-4
_SHOWN = 10
_PROBED = 16  # images of noise on which two functions are compared


@dataclasses.dataclass(frozen=True)
class Card:
    """A record and its evidence.

    Attributes:
      record: what goes to card.json.
      rows: the evidence of each of the record's rows.
      examples: what they are about.
    """

    record: CardRecord
    rows: list[Evidence]
    examples: Examples

    def __str__(self) -> str:
        """The table for a terminal."""
        return table(self.record)

    def _gallery(self) -> dict[str, np.ndarray]:
        """The first examples that the row with most broken ones broke, to be looked at."""
        main = max(range(len(self.rows)), key=lambda k: int((self.rows[k].attack >= 0).sum()))
        evidence = self.rows[main]
        index = np.flatnonzero(evidence.attack >= 0)[:_SHOWN]
        return {
            "row": np.asarray(self.record.rows[main].name),
            "index": index,
            "clean": self.examples.images[index],
            "adversarial": evidence.adversarial[index],
        }

    def save(self, folder: Path, keep_images: bool = False) -> None:
        """Write card.json and examples.npz, and adversarials.npz if they are kept."""
        arrays = {"id": self.examples.ids, "label": self.examples.labels, "clean_logits": self.examples.logits}
        for row, evidence in zip(self.record.rows, self.rows, strict=True):
            arrays |= {f"{row.name}/{name}": value for name, value in vars(evidence).items() if name != "adversarial"}
        write_arrays(folder / "examples.npz", arrays)
        write_arrays(folder / "gallery.npz", self._gallery())
        if keep_images:
            images = {
                f"{row.name}/{row.norm}": e.adversarial for row, e in zip(self.record.rows, self.rows, strict=True)
            }
            told = {"clean": self.examples.images, "label": self.examples.labels, "id": self.examples.ids}
            write_arrays(folder / "adversarials.npz", {**told, **images})
        write_json(folder / "card.json", self.record)


def evaluate(
    logits_fn: Callable[..., Any],
    images: np.ndarray,
    labels: np.ndarray,
    threat_model: ThreatModel,
    attacks: str | Sequence[str] = "autoattack",
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
      logits_fn: float32 images [N, H, W, C] to logits [N, classes], the same whenever it is called. A function that JAX
        cannot trace (a network of another library) is called with NumPy arrays; on it, and where JAX has no gradient,
        only attacks without gradients ("square", "bandits") can be run.
      images: float32 [n, H, W, C] in the threat model's box; labels: integers [n].
      threat_model: norm, eps, box.
      attacks: "autoattack", "full", or names of `rows.ATTACKS`, each of which makes a row.
      key: of all random draws, as `jax.random.key` makes them; `jax.random.key(0)` if not given.
      batch_size: examples a program takes at most. Results do not hang on it.
      faithful: keep the published attacks' quirks, for comparison with them.
      eps_l2: of the L2 row of "full".
      folder: where the card goes. Called again with the same arguments after a kill, the evaluation goes on from the
        last finished batch.
      keep_images: also write the adversarial images.
      ids: the examples' identities, different integers [n] that fit 32 bits; random draws follow from them. Their place
        if not given.
      subject, dataset: names for the card.

    Raises:
      ValueError: images, labels, ids, key, radius, logits or names that are not right, or a folder that holds another
        evaluation or is in use.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    ids = np.arange(len(images)) if ids is None else np.asarray(ids)
    check_question(images, labels, ids, threat_model)
    start = key_data(key)
    what = of_function(logits_fn, images)
    driver = Driver(_devices(what), batch_size, start)
    return measure(
        driver,
        what,
        images,
        labels,
        ids.astype(np.int32),
        threat_model,
        attacks=attacks,
        faithful=faithful,
        eps_l2=eps_l2,
        folder=None if folder is None else Path(folder),
        keep_images=keep_images,
        name=subject or (logits_fn.name if isinstance(logits_fn, Ticket) else "logits_fn"),
        subject_digest=logits_fn.digest if isinstance(logits_fn, Ticket) else "",
        dataset=dataset,
    )


def measure(
    driver: Driver,
    subject: Subject,
    images: np.ndarray,
    labels: np.ndarray,
    ids: np.ndarray,
    threat: ThreatModel,
    *,
    attacks: str | Sequence[str],
    faithful: bool = False,
    eps_l2: float = 0.5,
    folder: Path | None = None,
    keep_images: bool = False,
    name: str,
    subject_digest: str = "",
    dataset: str,
) -> Card:
    """As `evaluate`, with a driver whose programs are kept for the next classifier of the same shape."""
    classifier = subject.classifier
    logits = driver.logits(classifier, images)
    if not np.isfinite(logits).all():
        place = int(np.flatnonzero(~np.isfinite(logits).all(-1))[0])
        raise ValueError(f"logits must be finite; those of image {place} are {logits[place].tolist()}.")
    if labels.min() < 0 or labels.max() >= logits.shape[-1]:
        raise ValueError(
            f"labels must lie in [0, {logits.shape[-1] - 1}], one of the {logits.shape[-1]} logits; got "
            f"{labels.min()} to {labels.max()}."
        )
    examples = Examples(images, labels.astype(np.int32), ids, logits)
    rows = make_rows(attacks, threat, eps_l2, faithful, subject.obstacle)
    swept = sweep_rows(threat, images[0].size, subject.obstacle)
    classes, box = logits.shape[-1], [float(threat.lower), float(threat.upper)]
    noise = np.random.Generator(np.random.Philox(0)).random((_PROBED, *images.shape[1:]), np.float32)
    probe = (threat.lower + (threat.upper - threat.lower) * noise).astype(np.float32)
    function = {"program": np.asarray(subject.program(images)), "logits": driver.logits(classifier, probe)}
    subject_digest = subject_digest or digest(function)
    images_digest = digest({"images": images, "labels": examples.labels, "ids": ids})
    mode, seed = "faithful" if faithful else "default", driver.key.astype(">u4").tobytes().hex()
    question = {
        "format": _FORMAT,
        "model": digest({"weights": np.asarray(subject_digest), **function}),
        "images": images_digest,
        "clean logits": digest({"logits": logits}),
        "threat models": [f"{r.threat.norm} {float(r.threat.eps)!r} in {box}" for r in rows],
        "attacks": [[described(attack, classes) for attack in row.attacks] for row in rows],
        "mode": mode,
        "seed": seed,
    }
    with _claim(folder, question) if folder else contextlib.nullcontext():

        def run(row: Row, name: str) -> Evidence:
            return driver.run(row, classifier, examples, folder / "rows" / name if folder else None)

        checks = check_function(subject.raw, partial(driver.logits, classifier), images, threat)
        found = [run(row, row.name.lower().replace(" ", "-")) for row in rows]
        curve = [run(row, f"sweep-{float(row.threat.eps)!r}") for row in swept]
        for row, evidence in zip(rows, found, strict=True):
            some = examples.first(row.examples)
            checks += _named(row.name, check_row(row, evidence, some.logits, some.labels))
        checks += check_rows(rows, found)
        n = len(curve[0].attack)
        eps = [0.0, *(float(row.threat.eps) for row in swept)]
        robust = [float(examples.right[:n].mean()), *(float(e.standing.mean()) for e in curve)]
        checks += _named("sweep", check_sweep(eps, robust, n, *curve))
        record = CardRecord(
            subject=name,
            subject_digest=subject_digest,
            dataset=dataset,
            images_digest=images_digest,
            n=len(images),
            box=box,
            mode=mode,
            seed=seed,
            precision=PRECISION,
            clean=accuracy(examples.right),
            rows=[_row_record(row, e, examples) for row, e in zip(rows, found, strict=True)],
            sweep=Sweep(described(swept[0].attacks[0], classes), threat.norm, eps, robust, n),
            checks=checks,
            verdict=verdict(checks),
            provenance=provenance(),
        )
        card = Card(record, found, examples)
        if folder and is_main():
            card.save(folder, keep_images)
    return card


def replay(logits_fn: Callable[..., Any], folder: str | Path) -> dict[str, tuple[float, int]]:
    """Transfer: accuracy of another classifier on the images that a card has kept, and how many these are.

    Of each row its adversarial images (and the clean ones that it did not break), and of "clean" the clean ones.

    Raises:
      ValueError: the card kept no images, or the classifier takes others.
    """
    path = Path(folder) / "adversarials.npz"
    if not path.exists():
        raise ValueError(f"{path}: there are no adversarial images; evaluate with keep_images (--keep_images).")
    arrays = read_arrays(path)
    labels = arrays["label"]
    subject = of_function(logits_fn, arrays["clean"])
    driver = Driver(_devices(subject), 250, np.zeros(2, np.uint32))

    def right(images: np.ndarray) -> tuple[float, int]:
        n = len(images)
        return float(correct(driver.logits(subject.classifier, images), labels[:n]).mean()), n

    return {name: right(value) for name, value in arrays.items() if value.ndim == 4}


def _named(row: str, checks: Iterable[Check]) -> list[Check]:
    return [dataclasses.replace(check, name=f"{row}: {check.name}") for check in checks]


def _devices(subject: Subject) -> Mesh:
    """All, or one where the function is another library's."""
    return make_mesh() if subject.traced else make_mesh(jax.devices()[:1])


def _row_record(row: Row, e: Evidence, examples: Examples) -> RowRecord:
    classes, ids = examples.logits.shape[-1], examples.ids[: len(e.attack)]
    rounds = [attack.rounds_of(classes) for attack in row.attacks]
    broken, attacked = e.attack >= 0, e.attack != WRONG
    median = float(np.median(e.closest[attacked])) if np.isfinite(e.closest).any() else np.inf
    spent = e.queries + e.gradients
    most = int(spent.max(initial=1))
    efforts = sorted({k * 10**p for p in range(9) for k in (1, 2, 5) if k * 10**p < most} | {most})
    several = len(rounds) == 1 and rounds[0] > 1

    def left(beaten: Iterable[np.ndarray]) -> list[float]:
        return [float((attacked & ~(broken & early)).mean()) for early in beaten]

    return RowRecord(
        name=row.name,
        norm=row.threat.norm,
        eps=float(row.threat.eps),
        attacks=[described(attack, classes) for attack in row.attacks],
        rounds=rounds,
        robust=accuracy(e.standing),
        broken={attack.name: int((e.attack == k).sum()) for k, attack in enumerate(row.attacks)},
        unverified=int(e.unverified.sum()),
        fragile=ids[broken & (np.abs(e.margin) < _FRAGILE)].tolist(),
        median_distance=median if np.isfinite(median) else None,
        queries=int(e.queries.sum()),
        gradients=int(e.gradients.sum()),
        over_passes=Curve(efforts, left(spent <= effort for effort in efforts)),
        over_rounds=Curve(list(range(1, rounds[0] + 1)), left(e.round < r + 1 for r in range(rounds[0])))
        if several
        else None,
    )


def _claim(folder: Path, question: dict[str, Any]) -> contextlib.AbstractContextManager[None]:
    """Hold a folder for this evaluation, or refuse it where it holds another."""
    return Claim(folder, "question.json", question, str(folder), "evaluation", "folder").held()
