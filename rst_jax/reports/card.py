"""A card for a person: its table on a terminal, and its page with curves and adversarial images."""

from pathlib import Path

import numpy as np

from rst_jax.records import CardRecord, read_json
from rst_jax.reports.page import CYCLE, ROBUST, figure_of, label, pairs, render, svg, table_markup
from rst_jax.reports.text import columns, percent, radius
from rst_jax.runtime.files import among, check_arrays, read_arrays, write_text
from rst_jax.runtime.paths import local_path
from rst_jax.runtime.text import plain


def load_card(path: str | Path) -> CardRecord:
    """A card's record from its folder or its card.json.

    Raises:
      ValueError: there is none.
    """
    path = local_path(path)
    path = path / "card.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"there is no card at {path}; rst_jax evaluate writes one.")
    return read_json(path, CardRecord)


def row_cells(record: CardRecord) -> tuple[list[str], list[list[str]]]:
    """The header and the lines of a card's table."""
    lines = [["clean", "", percent(record.clean), f"{record.clean.n:,}", "", ""]]
    for row in record.rows:
        by = ", ".join(f"{name} {count}" for name, count in row.broken.items() if count) or "-"
        by += f"; {row.unverified} not verified" if row.unverified else ""
        by += f"; {row.failed} failed to run" if row.failed else ""
        by += f"; {len(row.fragile)} fragile" if row.fragile else ""
        by += f"; median L2 {row.median_distance:.4g}" if row.median_distance is not None else ""
        where = f"{row.norm} {radius(row.eps)}"
        passes = f"{row.queries + row.gradients:,}"
        lines.append([row.name, where, percent(row.robust), f"{row.robust.n:,}", by, passes])
    return ["attack", "threat model", "robust %", "n", "broken by", "passes"], lines


def card_text(record: CardRecord) -> str:
    """A card as text for a terminal."""
    told = columns(*row_cells(record), right=False)
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
    return "\n".join(map(plain, told))


def write_card_page(folder: Path) -> Path:
    """Write index.html beside card.json and return its path."""
    record = load_card(folder)
    header, rows = row_cells(record)
    p = record.provenance
    libraries = ", ".join(f"{k} {v}" for k, v in p.libraries.items())
    path = folder / "index.html"
    made = f"rst_jax {p.version} ({p.revision}) on {p.hardware}, Python {p.python}, {libraries}; {p.created}."
    write_text(path, render(_title(record), header, rows, _notes(record), _pictures(folder, record), made))
    return path


def card_figures(folder: Path) -> list[tuple[str, str, str]]:
    """The card as sections of another page: (title, picture, caption)."""
    record = load_card(folder)
    first = (_title(record), table_markup(*row_cells(record)), " ".join(_notes(record)))
    return [first, *_pictures(folder, record)]


def _title(record: CardRecord) -> str:
    return f"Evaluation card: {record.subject} on {record.dataset}"


def _notes(record: CardRecord) -> list[str]:
    failed = [check for check in record.checks if not check.passed]
    told = [
        f"Verdict: {record.verdict}.",
        f"{len(record.checks) - len(failed)} of {len(record.checks)} checks passed. {record.n:,} test images, 95 % "
        f"intervals; {record.mode} mode, seed {record.seed}, {record.precision}. Every adversarial image counted was "
        f"run again at another batch size and checked against ball and box. Digests: subject "
        f"{record.subject_digest[:12]}, images {record.images_digest[:12]}.",
    ]
    return told


def _pictures(folder: Path, record: CardRecord) -> list[tuple[str, str, str]]:
    arrays = read_arrays(folder / "examples.npz")
    return [
        (
            "Accuracy over eps and over effort",
            _curves(record),
            "First: over the radius of the ball, to where every image can be reached (0 is expected there). Second: "
            "over the passes spent on an example. Third, if an attack has restarts or targets: over them.",
        ),
        (
            "Adversarial images",
            _gallery(folder, record, arrays),
            "Above: clean test images and their class. Below: what the cascade that broke most made of them, what that "
            "is taken for, and the attack.",
        ),
    ]


def _curves(record: CardRecord) -> str:
    several = any(row.over_rounds for row in record.rows)
    figure, panels = figure_of(10, 3.2, 3 if several else 2)
    left, middle, *right = panels
    if s := record.sweep:
        left.plot(s.eps, [100 * r for r in s.robust], color=ROBUST, marker="o", markersize=4)
        left.set_xscale("symlog", linthresh=max(min((e for e in s.eps if e), default=1e-3), 1e-6))
        left.set_xlabel(f"eps ({s.norm})")
    for i, row in enumerate(record.rows):
        for curve, axes in ((row.over_passes, middle), (row.over_rounds, right[0] if right else None)):
            if curve and axes:
                percent, colour = [100 * r for r in curve.robust], CYCLE[i % len(CYCLE)]
                axes.plot(curve.effort, percent, color=colour, marker="o", markersize=3, label=label(row.name))
    middle.set_xscale("log")
    middle.set_xlabel("passes an example")
    for axes in right:
        axes.set_xlabel("restarts or targets")
    for axes in (middle, *right):
        axes.legend(frameon=False, fontsize=7)
    for axes in panels:
        axes.set_ylim(0, 102)
        axes.grid(axis="y", color="#e4e8eb")
    left.set_ylabel("robust accuracy (%)")
    return svg(figure)


def _gallery(folder: Path, record: CardRecord, arrays: dict[str, np.ndarray]) -> str:
    path = folder / "gallery.npz"
    if not path.exists():
        return ""
    shown = read_arrays(path)
    check_arrays(path, shown, {"row": "U", "index": "i n", "clean": "f n h w c", "adversarial": "f n h w c"})
    row = next((r for r in record.rows if r.name == str(shown["row"])), None)
    if row is None or not len(shown["index"]):
        return ""
    index, names, told = shown["index"], list(row.broken), f"{row.name}/"
    wanted = {"label": "i m", f"{told}attack": "i k", f"{told}prediction": "i k"}
    n = min(check_arrays(folder / "examples.npz", arrays, wanted).values())
    if not among(index, n) or not among(attack := arrays[f"{told}attack"][index], len(names)):
        raise ValueError(f"{path}: its examples are not among those that {row.name} broke.")
    labels, prediction = arrays["label"][index], arrays[f"{told}prediction"][index]
    said = [[str(k) for k in labels], [f"{k}\n{names[a]}" for k, a in zip(prediction, attack, strict=True)]]
    lower, upper = record.box
    clean, adversarial = ((shown[name] - lower) / (upper - lower) for name in ("clean", "adversarial"))
    return pairs(clean, adversarial, said, [[False] * len(index), [True] * len(index)])
