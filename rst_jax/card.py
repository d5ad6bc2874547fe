"""The card: one classifier, many attacks, the evidence for every example, and a verdict on the whole.

    card = rst_jax.evaluate(logits_fn, images, labels, rst_jax.ThreatModel(8 / 255), attacks="autoattack")
    print(card)

A card's folder holds `card.json`, `examples.npz` (arrays over the examples, a row's under its name) and, where they are
kept, `adversarials.npz`; while it is being made, also `question.json` and the finished batches.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rst_jax.checks import check_function, check_row, check_rows, check_sweep, verdict
from rst_jax.driver import Classifier, Driver, Evidence, Examples, Row, correct
from rst_jax.mesh import is_main, make_mesh, on_main
from rst_jax.records import (
    Accuracy,
    CardRecord,
    RowRecord,
    Sweep,
    accuracy,
    digest,
    provenance,
    read_arrays,
    read_json,
    write_arrays,
    write_json,
)
from rst_jax.rows import described, make_rows, sweep_rows
from rst_jax.threat import ThreatModel
from rst_jax.ticket import Ticket

Tree = Any
_FORMAT = 1
_FRAGILE = 1e-4
_SHOWN = 10
_PRECISION = "float32, highest matmul precision"


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
        cannot trace (a network of another library) is called with NumPy arrays; only attacks without gradients
        ("square", "bandits") can be run on it.
      images: float32 [n, H, W, C] in the threat model's box; labels: integers [n].
      threat_model: norm, eps, box.
      attacks: "autoattack", "full", or names of `rows.ATTACKS`, each of which makes a row.
      key: of all random draws; `jax.random.key(0)` if not given.
      batch_size: examples a program takes at most. Results do not hang on it.
      faithful: keep the published attacks' quirks, for comparison with them.
      eps_l2: of the L2 row of "full".
      folder: where the card goes. Called again with the same arguments after a kill, the evaluation goes on from the
        last finished batch.
      keep_images: also write the adversarial images.
      ids: the examples' identities, int [n]; random draws follow from them. Their place if not given.
      subject, dataset: names for the card.

    Raises:
      ValueError: images, labels, logits or names that are not right, or a folder that holds another evaluation.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    _check_examples(images, labels, threat_model)
    classifier, raw, traced = _classifier(logits_fn, images)
    mesh = make_mesh() if traced else make_mesh(jax.devices()[:1])
    key_data = np.asarray(jax.random.key_data(jax.random.key(0) if key is None else key))
    driver = Driver(mesh, batch_size, key_data)
    return measure(
        driver,
        classifier,
        raw,
        images,
        labels,
        np.arange(len(images), dtype=np.int32) if ids is None else np.asarray(ids, np.int32),
        threat_model,
        attacks=attacks,
        faithful=faithful,
        eps_l2=eps_l2,
        folder=None if folder is None else Path(folder),
        keep_images=keep_images,
        subject=subject or (logits_fn.meta.get("name", "ticket") if isinstance(logits_fn, Ticket) else "logits_fn"),
        subject_digest=logits_fn.digest if isinstance(logits_fn, Ticket) else "",
        dataset=dataset,
        differentiable=traced,
    )


def measure(
    driver: Driver,
    classifier: Classifier,
    raw: Callable[[np.ndarray], np.ndarray],
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
    subject: str,
    subject_digest: str = "",
    dataset: str,
    differentiable: bool = True,
) -> Card:
    """As `evaluate`, with a driver whose programs are kept for the next classifier of the same shape."""
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
    rows = make_rows(attacks, threat, eps_l2, faithful, differentiable)
    swept = sweep_rows(threat, images[0].size, differentiable)
    subject_digest = subject_digest or digest({"logits": logits})
    images_digest = digest({"images": images, "labels": examples.labels, "ids": ids})
    mode, seed = "faithful" if faithful else "default", driver.key.astype(">u4").tobytes().hex()
    if folder:
        question = {
            "format": _FORMAT,
            "model": subject_digest,
            "images": images_digest,
            "threat models": [f"{row.threat.norm} {row.threat.eps:.6g}" for row in rows],
            "attacks": [[described(attack) for attack in row.attacks] for row in rows],
            "mode": mode,
            "seed": seed,
        }
        on_main(partial(_claim, folder, question))
    checks = check_function(raw, partial(driver.logits, classifier), images)
    found = [driver.run(row, classifier, examples, _place(folder, row.name)) for row in rows]
    curve = [driver.run(row, classifier, examples, _place(folder, f"sweep {row.threat.eps:.6g}")) for row in swept]
    for row, evidence in zip(rows, found, strict=True):
        some = examples.first(row.examples)
        for check in check_row(row, evidence, some.logits, some.labels):
            checks.append(dataclasses.replace(check, name=f"{row.name}: {check.name}"))
    checks += check_rows(rows, found)
    n = len(curve[0].attack)
    eps = [0.0, *(float(row.threat.eps) for row in swept)]
    robust = [float(examples.right[:n].mean()), *(float(e.standing.mean()) for e in curve)]
    checks += check_sweep(eps, robust, n)
    record = CardRecord(
        subject=subject,
        subject_digest=subject_digest,
        dataset=dataset,
        images_digest=images_digest,
        n=len(images),
        mode=mode,
        seed=seed,
        precision=_PRECISION,
        clean=accuracy(examples.right),
        rows=[_row_record(row, e) for row, e in zip(rows, found, strict=True)],
        sweep=Sweep(described(swept[0].attacks[0]), threat.norm, eps, robust, n),
        checks=checks,
        verdict=verdict(checks),
        provenance=provenance(),
    )
    card = Card(record, found, examples)
    if folder and is_main():
        card.save(folder, keep_images)
    return card


def replay(logits_fn: Callable[..., Any], folder: str | Path) -> dict[str, float]:
    """Transfer: accuracy of another classifier on the adversarial images that a card has kept, row by row, and "clean".

    Raises:
      ValueError: the card kept no images, or the classifier takes others.
    """
    path = Path(folder) / "adversarials.npz"
    if not path.exists():
        raise ValueError(f"{path}: there are no adversarial images; evaluate with keep_images (--keep_images).")
    arrays = read_arrays(path)
    labels = arrays["label"]
    classifier, _, traced = _classifier(logits_fn, arrays["clean"])
    driver = Driver(make_mesh() if traced else make_mesh(jax.devices()[:1]), 250, np.zeros(2, np.uint32))

    def right(images: np.ndarray) -> float:
        return float(correct(driver.logits(classifier, images), labels[: len(images)]).mean())

    return {name: right(value) for name, value in arrays.items() if value.ndim == 4}


def of_ticket(ticket: Ticket) -> Classifier:
    """A ticket as what the driver takes; tickets of one network share programs."""
    return Classifier(_apply(ticket.module), ticket.variables)


@lru_cache(maxsize=32)
def _apply(module: nn.Module) -> Callable[[Tree, jax.Array], jax.Array]:
    return partial(module.apply, train=False)  # type: ignore[return-value]


def _classifier(
    logits_fn: Callable[..., Any], images: np.ndarray
) -> tuple[Classifier, Callable[[np.ndarray], np.ndarray], bool]:
    """The function as a classifier, as it is on NumPy arrays, and whether JAX can trace it."""

    def raw(x: np.ndarray) -> np.ndarray:
        with jax.default_matmul_precision("highest"):
            return np.asarray(logits_fn(x))

    first = raw(images[:2])
    if first.ndim != 2 or len(first) != len(images[:2]) or first.shape[1] < 2:
        raise ValueError(
            f"logits_fn must give logits [N, classes], at least two; for images {list(images[:2].shape)} it gave "
            f"{list(first.shape)}."
        )
    if not np.issubdtype(first.dtype, np.floating):
        raise ValueError(f"logits_fn must give floats; got {first.dtype}.")
    if isinstance(logits_fn, Ticket):
        return of_ticket(logits_fn), raw, True
    try:
        jax.eval_shape(logits_fn, jax.ShapeDtypeStruct(images[:2].shape, jnp.float32))
    except Exception:  # whatever another library says of a tracer
        classes = first.shape[1]

        def outside(x: Any) -> np.ndarray:
            return np.asarray(logits_fn(np.asarray(x)), np.float32)

        def called(_: Tree, x: jax.Array) -> jax.Array:
            return jax.pure_callback(outside, jax.ShapeDtypeStruct((x.shape[0], classes), jnp.float32), x)

        return Classifier(called), raw, False
    return Classifier(lambda _, x: jnp.asarray(logits_fn(x), jnp.float32)), raw, True


def _check_examples(images: np.ndarray, labels: np.ndarray, threat: ThreatModel) -> None:
    if images.ndim != 4 or not len(images):
        raise ValueError(f"images must be [n, H, W, C], at least one; got {list(images.shape)}.")
    if images.dtype != np.float32:
        hint = " Divide integers by 255." if np.issubdtype(images.dtype, np.integer) else ""
        raise ValueError(f"images must be float32 in [{threat.lower:g}, {threat.upper:g}]; got {images.dtype}.{hint}")
    low, high = float(images.min()), float(images.max())
    if not (low >= threat.lower and high <= threat.upper):
        raise ValueError(
            f"images must lie in [{threat.lower:g}, {threat.upper:g}]; got values from {low:.4g} to {high:.4g}."
        )
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"labels must be integers [{len(images)}], one an image; got {labels.dtype} {list(labels.shape)}."
        )


def _row_record(row: Row, e: Evidence) -> RowRecord:
    measured = np.isfinite(e.closest).any()
    attacked = e.attack != -2
    median = float(np.median(e.closest[attacked])) if measured else None
    return RowRecord(
        name=row.name,
        norm=row.threat.norm,
        eps=float(row.threat.eps),
        attacks=[described(attack) for attack in row.attacks],
        rounds=[attack.rounds for attack in row.attacks],
        robust=accuracy(e.standing),
        broken={attack.name: int((e.attack == k).sum()) for k, attack in enumerate(row.attacks)},
        unverified=int(e.unverified.sum()),
        fragile=int(((e.attack >= 0) & (np.abs(e.margin) < _FRAGILE)).sum()),
        median_distance=median if median is not None and np.isfinite(median) else None,
        queries=int(e.queries.sum()),
        gradients=int(e.gradients.sum()),
    )


def _place(folder: Path | None, name: str) -> Path | None:
    return folder / "rows" / name.lower().replace(" ", "-") if folder else None


def _claim(folder: Path, question: dict[str, Any]) -> None:
    """Hold a folder for this evaluation, or refuse it where it holds another."""
    path = folder / "question.json"
    question = json.loads(json.dumps(question))
    if folder.is_file():
        raise ValueError(f"{folder} is a file; take a folder.")
    if not path.exists():
        if folder.exists() and any(p.name[0] != "." for p in folder.iterdir()):
            raise ValueError(f"{folder} holds other files and no evaluation; take an empty or a new folder.")
        write_json(path, question)
        return
    try:
        before = json.loads(path.read_text())
        changed = [
            f"{name} was {_short(before.get(name))}, now {_short(now)}"
            for name, now in question.items()
            if before.get(name) != now
        ]
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); take a new folder.") from error
    if changed:
        raise ValueError(f"{folder} belongs to another evaluation: {'; '.join(changed)}. Take a new folder.")


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:32]}..."


def load_card(path: str | Path) -> CardRecord:
    """A card's record from its folder or its card.json.

    Raises:
      ValueError: there is none.
    """
    path = Path(path)
    path = path / "card.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"there is no card at {path}; rst_jax evaluate writes one.")
    return read_json(path, CardRecord)


def row_cells(record: CardRecord) -> tuple[list[str], list[list[str]]]:
    """The header and the lines of a card's table."""

    def percent(a: Accuracy) -> str:
        return f"{100 * a.value:.1f} [{100 * a.low:.1f}, {100 * a.high:.1f}]"

    lines = [["clean", "", percent(record.clean), f"{record.clean.n:,}", "", ""]]
    for row in record.rows:
        by = ", ".join(f"{name} {count}" for name, count in row.broken.items() if count) or "-"
        by += f"; {row.unverified} not verified" if row.unverified else ""
        by += f"; {row.fragile} fragile" if row.fragile else ""
        by += f"; median L2 {row.median_distance:.4g}" if row.median_distance is not None else ""
        where = f"{row.norm} {pretty_eps(row.eps)}"
        passes = f"{row.queries + row.gradients:,}"
        lines.append([row.name, where, percent(row.robust), f"{row.robust.n:,}", by, passes])
    return ["attack", "threat model", "robust %", "n", "broken by", "passes"], lines


def table(record: CardRecord) -> str:
    """A card as text for a terminal."""
    header, lines = row_cells(record)
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    told = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in [header, *lines]]
    told.insert(1, "  ".join("-" * w for w in widths))
    if s := record.sweep:
        points = ", ".join(f"{e:.3g}: {100 * r:.1f}" for e, r in zip(s.eps, s.robust, strict=True))
        told += ["", f"robust % of the first {s.n:,} over eps ({s.norm}, {s.attack.split('(')[0]}): {points}"]
    p = record.provenance
    told += [
        "",
        f"{record.subject} ({record.subject_digest[:12]}) on {record.dataset}; 95 % intervals; {record.mode} mode, "
        f"seed {record.seed}; {record.precision}; rst_jax {p.version} ({p.revision}), jax {p.libraries['jax']}, "
        f"{p.hardware}",
        f"checks: {sum(c.passed for c in record.checks)} of {len(record.checks)} passed",
        f"verdict: {record.verdict}",
    ]
    return "\n".join(told)


def pretty_eps(eps: float) -> str:
    """8/255 as such, other radii as decimals."""
    levels = eps * 255
    return f"{round(levels)}/255" if eps and abs(levels - round(levels)) < 1e-6 else f"{eps:.4g}"
