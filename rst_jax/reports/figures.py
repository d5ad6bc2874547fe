"""The plots of a run's report, each as markup; empty where the workdir has nothing for it."""

from typing import Any

import numpy as np

from rst_jax.reports.page import CYCLE, INK, NATURAL, ROBUST, figure_of, label, pairs, svg
from rst_jax.reports.results import Results


def ratio_plot(results: Results) -> str:
    """Natural and robust accuracy against remaining ratio, with their intervals (the paper's Fig. 1 a-d)."""
    drawn = results.tickets_alone
    if not drawn:
        return ""
    figure, axes = figure_of(8, 3.6)
    x, attack = [100 * t.remaining_ratio for t in drawn], label(drawn[0].attack.name)
    series = (("natural", "natural", NATURAL), (f"robust ({attack})", "robust", ROBUST))
    for told, field, colour in series:
        points: list[Any] = [getattr(t, field) for t in drawn]
        y = np.array([100 * a.value for a in points])
        bars = [y - [100 * a.low for a in points], [100 * a.high for a in points] - y]
        axes.errorbar(x, y, yerr=bars, color=colour, marker="o", capsize=3, label=told)
        for t in results.dense:
            axes.axhline(
                100 * getattr(t, field).value, color=colour, linestyle="--", linewidth=1.2, label=f"{told}, dense"
            )
    axes.set_xscale("log")
    axes.set_xticks(x, [f"{v:g}" for v in x])
    axes.minorticks_off()
    axes.set_xlabel("remaining ratio (%)")
    axes.set_ylabel("test accuracy (%)")
    axes.grid(axis="y", color="#e4e8eb")
    axes.legend(frameon=False, ncols=2, loc="lower right")
    return svg(figure)


def transfer_plot(results: Results) -> str:
    """The transfer matrix."""
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


def r2s_plot(results: Results) -> str:
    """What switching is worth, beside the best single ticket."""
    r = results.r2s
    if r is None or len(r.names) < 2:
        return ""
    figure, axes = figure_of(8, 2.2)
    bars = [
        (f"best single ticket ({label(r.best_single_name)}), attacked", r.best_single, ROBUST),
        ("R2S, worst of the attacks on its tickets", r.worst_of_pool, CYCLE[2]),
        ("R2S, transfer only (paper)", r.transfer_only, CYCLE[5]),
        ("R2S, natural", r.natural, NATURAL),
    ]
    for place, (_, value, colour) in enumerate(bars):
        axes.barh(place, 100 * value, color=colour, height=0.65)
        axes.text(100 * value - 1, place, f"{100 * value:.1f}", va="center", ha="right", color="white")
    axes.set_yticks(range(len(bars)), [told for told, _, _ in bars])
    axes.set_xlim(0, 100)
    axes.set_xlabel("accuracy (%)")
    return svg(figure)


def curves_plot(results: Results) -> str:
    """Training accuracy under attack, and both accuracies on the images that choose the best epoch."""
    if not results.metrics:
        return ""
    chosen = "held-out" if results.tickets[0].selected_on == "holdout" else "test"
    figure, (left, right) = figure_of(9, 3.4, 2)
    for i, ticket in enumerate(results.tickets):
        rows = [row for row in results.metrics if row["run"] == ticket.name]
        colour, style = CYCLE[i % len(CYCLE)], "--" if ticket.kind == "dense" else "-"
        train = [(row["step"], 100 * row["adversarial_accuracy"]) for row in rows if "adversarial_accuracy" in row]
        both = [row for row in rows if {"natural", "robust"} <= row.keys()]
        held = [(row["step"], 100 * row["natural"], 100 * row["robust"]) for row in both]
        if train:
            left.plot(*zip(*train, strict=True), color=colour, linestyle=style, label=label(ticket.name), linewidth=1.4)
        if held:
            steps, natural, robust = zip(*held, strict=True)
            right.plot(steps, natural, color=colour, linestyle=style, linewidth=0.8)
            right.plot(steps, robust, color=colour, linestyle=style, linewidth=1.8, marker="o", markersize=3)
    for axes, told in ((left, "training accuracy under attack (%)"), (right, f"{chosen} accuracy (%)")):
        axes.set_xlabel("step")
        axes.set_ylabel(told)
        axes.grid(axis="y", color="#e4e8eb")
    left.legend(frameon=False, fontsize=8)
    return svg(figure)


def gallery_plot(results: Results) -> str:
    """Clean images above their adversarial ones."""
    g = results.gallery
    if g is None:
        return ""
    said, wrong = [], []
    for kind in ("clean", "adversarial"):
        prediction = g[f"{kind}_prediction"]
        said.append([str(g["names"][k]) for k in prediction])
        wrong.append((prediction != g["labels"]).tolist())
    return pairs(g["clean"], g["adversarial"], said, wrong)
