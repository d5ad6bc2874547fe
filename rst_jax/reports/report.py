"""What a run found, for a person: a table on the terminal and one self-contained page with its plots."""

from pathlib import Path

from rst_jax.reports.card import card_figures
from rst_jax.reports.figures import curves_plot, gallery_plot, r2s_plot, ratio_plot, transfer_plot
from rst_jax.reports.page import render
from rst_jax.reports.results import Results
from rst_jax.reports.text import columns, percent, radius
from rst_jax.runtime.files import write_text
from rst_jax.runtime.text import plain


def _cells(results: Results) -> tuple[list[str], list[list[str]]]:
    attack = results.tickets[0].attack.name
    header = ["network", "weights kept", "natural %", f"{attack} %", "best epoch"]
    rows = [
        [
            "dense, adversarially trained" if t.kind == "dense" else f"ticket, ratio {t.remaining_ratio:g}",
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
        told.append(f"{violations} adversarial images left the threat model; they do not count as robust.")
    if (r := results.r2s) and len(r.names) > 1:
        single = f"best single ticket ({r.best_single_name}) {100 * r.best_single:.1f} %"
        told.append(
            f"R2S over {len(r.names)} tickets: {100 * r.natural:.1f} % natural; {100 * r.transfer_only:.1f} % when one "
            f"random ticket is attacked (transfer only, the paper's figure); {100 * r.worst_of_pool:.1f} % under "
            f"the worst of these attacks for each image; {single}."
        )
    return told


def report_text(results: Results) -> str:
    """The figures as text for a terminal."""
    return "\n".join(map(plain, [*columns(*_cells(results), right=True), "", *_sentences(results)]))


def write_report(workdir: Path, results: Results) -> Path:
    """Write report/index.html, one file with everything in it, and return its path."""
    figures = [
        (
            "Accuracy against remaining ratio",
            ratio_plot(results),
            "As in the paper's Fig. 1. Bars: 95 % intervals; dashed: the dense, adversarially trained network.",
        ),
        (
            "Transfer",
            transfer_plot(results),
            "Robust accuracy (%) of the ticket of the column on images made against the ticket of the row.",
        ),
        ("Random robust switching (R2S)", r2s_plot(results), "Expected accuracy, exact over the picks."),
        (
            "Training",
            curves_plot(results),
            "Left: accuracy on the adversarial training images. Right: on the images that choose the best epoch, "
            "clean (thin) and attacked (thick). Dashed: dense.",
        ),
        (
            "Adversarial images",
            gallery_plot(results),
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
    page = render(title, *_cells(results), _sentences(results), figures, made)
    path = workdir / "report" / "index.html"
    write_text(path, page)
    return path
