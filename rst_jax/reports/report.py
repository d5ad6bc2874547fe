"""What a run found, for a person: a table on the terminal and one self-contained page with its plots."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from rst_jax.records import R2SRecord, TicketRecord, TransferRecord, read_json
from rst_jax.reports.card import card_figures
from rst_jax.reports.page import CYCLE, INK, NATURAL, ROBUST, figure_of, pairs, render, svg
from rst_jax.reports.text import columns, percent, radius
from rst_jax.runtime.files import read_arrays, read_lines, write_text


@dataclasses.dataclass(frozen=True)
class Results:
    """All that a workdir has recorded; a part that was not run is None or empty."""

    tickets: list[TicketRecord]
    transfer: TransferRecord | None
    r2s: R2SRecord | None
    metrics: list[dict[str, Any]]
    gallery: dict[str, np.ndarray] | None
    cards: list[Path] = dataclasses.field(default_factory=list)


def read_results(workdir: Path, names: list[str]) -> Results:
    """The records of the named tickets and whatever else lies in results/.

    Raises:
      ValueError: nothing was evaluated yet, or a record is broken.
    """
    folder = workdir / "results"
    tickets = [read_json(folder / f"{n}.json", TicketRecord) for n in names if (folder / f"{n}.json").exists()]
    if not tickets:
        raise ValueError(f"{workdir}: nothing evaluated yet; run with --config.task=evaluate first.")
    transfer, r2s, gallery = (folder / n for n in ("transfer.json", "r2s.json", "gallery.npz"))
    return Results(
        tickets,
        read_json(transfer, TransferRecord) if transfer.exists() else None,
        read_json(r2s, R2SRecord) if r2s.exists() else None,
        read_lines(workdir / "metrics.jsonl"),
        read_arrays(gallery) if gallery.exists() else None,
        [card.parent for t in tickets for card in sorted((folder / "cards").glob(f"{t.name}-*/card.json"))],
    )


def _rows(results: Results) -> tuple[list[str], list[list[str]]]:
    attack = results.tickets[0].attack.name
    header = ["network", "weights kept", "natural %", f"{attack} %", "best epoch"]
    rows = [
        [
            "dense, adversarially trained" if t.name == "dense" else f"ticket, ratio {t.remaining_ratio:g}",
            f"{t.weights_kept:,} / {t.weights_total:,}",
            percent(t.natural),
            percent(t.robust),
            str(t.best_epoch),
        ]
        for t in results.tickets
    ]
    return header, rows


def _sentences(results: Results) -> list[str]:
    t = results.tickets[0]
    a = t.attack
    told = [
        f"{t.dataset}, {t.model}: {t.natural.n:,} test images, 95 % intervals; {a.name}, {a.norm}, eps "
        f"{radius(a.eps)}, step {a.step_size:.4g}, {a.restarts} start, seed {a.seed}; {t.precision}; best epoch chosen "
        f"on {'held-out training images' if t.selected_on == 'holdout' else 'the test images'}. "
        "PGD alone overestimates robustness."
    ]
    if violations := sum(record.violations for record in results.tickets):
        told.append(f"{violations} adversarial images left the threat model and were not counted.")
    if (r := results.r2s) and len(r.names) > 1:
        single = f"best single ticket ({r.best_single_name}) {100 * r.best_single:.1f} %"
        told.append(
            f"R2S over {len(r.names)} tickets: {100 * r.natural:.1f} % natural; {100 * r.transfer_only:.1f} % when one "
            f"random ticket is attacked (transfer only, the paper's figure); {100 * r.worst_of_pool:.1f} % under "
            f"the worst of these attacks for each image; {single}."
        )
    return told


def table(results: Results) -> str:
    """The figures as text for a terminal."""
    return "\n".join([*columns(*_rows(results), right=True), "", *_sentences(results)])


def write_report(workdir: Path, results: Results) -> Path:
    """Write report/index.html, one file with everything in it, and return its path."""
    figures = [
        (
            "Accuracy against remaining ratio",
            _ratio_plot(results),
            "As in the paper's Fig. 1. Bars: 95 % intervals; dashed: the dense, adversarially trained network.",
        ),
        (
            "Transfer",
            _transfer_plot(results),
            "Robust accuracy (%) of the ticket of the column on images made against the ticket of the row.",
        ),
        ("Random robust switching (R2S)", _r2s_plot(results), "Expected accuracy, exact over the draws."),
        (
            "Training",
            _curves_plot(results),
            "Left: accuracy on the adversarial training images. Right: on the images that choose the best epoch, "
            "clean (thin) and attacked (thick). Dashed: dense.",
        ),
        (
            "Adversarial images",
            _gallery_plot(results),
            "Above: clean test images and what the ticket says. Below: the same under attack; red where it is wrong.",
        ),
    ]
    for card in results.cards:
        figures += card_figures(card)
    t = results.tickets[0]
    p = t.provenance
    made = (
        f"rst_jax {p.version} ({p.revision}) on {p.hardware}, Python {p.python}, "
        + ", ".join(f"{k} {v}" for k, v in p.libraries.items())
        + f"; {p.created}. Digests: "
        + ", ".join(f"{r.name} {r.digest[:12]}" for r in results.tickets)
        + "."
    )
    title = f"Robust scratch tickets: {t.dataset}, {t.model}"
    page = render(title, *_rows(results), _sentences(results), figures, made)
    path = workdir / "report" / "index.html"
    write_text(path, page)
    return path


def _ratio_plot(results: Results) -> str:
    drawn = [t for t in results.tickets if t.name != "dense"]
    dense = [t for t in results.tickets if t.name == "dense"]
    if not drawn:
        return ""
    figure, axes = figure_of(8, 3.6)
    x = [100 * t.remaining_ratio for t in drawn]
    series = (("natural", "natural", NATURAL), (f"robust ({drawn[0].attack.name})", "robust", ROBUST))  # fmt: skip
    for label, field, colour in series:
        points: list[Any] = [getattr(t, field) for t in drawn]
        y = np.array([100 * a.value for a in points])
        bars = [y - [100 * a.low for a in points], [100 * a.high for a in points] - y]
        axes.errorbar(x, y, yerr=bars, color=colour, marker="o", capsize=3, label=label)
        for t in dense:
            axes.axhline(
                100 * getattr(t, field).value, color=colour, linestyle="--", linewidth=1.2, label=f"{label}, dense"
            )
    axes.set_xscale("log")
    axes.set_xticks(x, [f"{v:g}" for v in x])
    axes.minorticks_off()
    axes.set_xlabel("remaining ratio (%)")
    axes.set_ylabel("test accuracy (%)")
    axes.grid(axis="y", color="#e4e8eb")
    axes.legend(frameon=False, ncols=2, loc="lower right")
    return svg(figure)


def _transfer_plot(results: Results) -> str:
    t = results.transfer
    if t is None or len(t.names) < 2:
        return ""
    figure, axes = figure_of(6, 4.6)
    values = 100 * np.array(t.robust)
    image = axes.imshow(values, cmap="Blues")
    labels = [f"{100 * r:g} %" for r in t.ratios]
    axes.set_xticks(range(len(labels)), labels)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xlabel("inference on the ticket of ratio")
    axes.set_ylabel("attack on the ticket of ratio")
    middle = (values.min() + values.max()) / 2
    for (i, j), value in np.ndenumerate(values):
        axes.text(j, i, f"{value:.1f}", ha="center", va="center", color="white" if value > middle else INK)
    figure.colorbar(image, ax=axes, label="robust accuracy (%)")
    return svg(figure)


def _r2s_plot(results: Results) -> str:
    r = results.r2s
    if r is None or len(r.names) < 2:
        return ""
    figure, axes = figure_of(8, 2.2)
    bars = [
        (f"best single ticket ({r.best_single_name}), attacked", r.best_single, ROBUST),
        ("R2S, worst of the attacks on its tickets", r.worst_of_pool, CYCLE[2]),
        ("R2S, transfer only (paper)", r.transfer_only, CYCLE[5]),
        ("R2S, natural", r.natural, NATURAL),
    ]
    for place, (_, value, colour) in enumerate(bars):
        axes.barh(place, 100 * value, color=colour, height=0.65)
        axes.text(100 * value - 1, place, f"{100 * value:.1f}", va="center", ha="right", color="white")
    axes.set_yticks(range(len(bars)), [label for label, _, _ in bars])
    axes.set_xlim(0, 100)
    axes.set_xlabel("accuracy (%)")
    return svg(figure)


def _curves_plot(results: Results) -> str:
    names = [t.name for t in results.tickets]
    if not results.metrics:
        return ""
    chosen = "held-out" if results.tickets[0].selected_on == "holdout" else "test"
    figure, (left, right) = figure_of(9, 3.4, 2)
    for i, name in enumerate(names):
        rows = [row for row in results.metrics if row["run"] == name]
        colour, style = CYCLE[i % len(CYCLE)], "--" if name == "dense" else "-"
        train = [(row["step"], 100 * row["adversarial_accuracy"]) for row in rows if "adversarial_accuracy" in row]
        held = [(row["step"], 100 * row["natural"], 100 * row["robust"]) for row in rows if "robust" in row]
        if train:
            left.plot(*zip(*train, strict=True), color=colour, linestyle=style, label=name, linewidth=1.4)
        if held:
            steps, natural, robust = zip(*held, strict=True)
            right.plot(steps, natural, color=colour, linestyle=style, linewidth=0.8)
            right.plot(steps, robust, color=colour, linestyle=style, linewidth=1.8, marker="o", markersize=3)
    for axes, label in ((left, "training accuracy under attack (%)"), (right, f"{chosen} accuracy (%)")):
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.grid(axis="y", color="#e4e8eb")
    left.legend(frameon=False, fontsize=8)
    return svg(figure)


def _gallery_plot(results: Results) -> str:
    g = results.gallery
    if g is None:
        return ""
    said, wrong = [], []
    for kind in ("clean", "adversarial"):
        prediction = g[f"{kind}_prediction"]
        said.append([str(g["names"][k]) for k in prediction])
        wrong.append((prediction != g["labels"]).tolist())
    return pairs(g["clean"], g["adversarial"], said, wrong)
