"""A card for a terminal."""

from pathlib import Path

from rst_jax.records import CardRecord, read_json
from rst_jax.reports.text import columns, percent, radius


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
    lines = [["clean", "", percent(record.clean), f"{record.clean.n:,}", "", ""]]
    for row in record.rows:
        by = ", ".join(f"{name} {count}" for name, count in row.broken.items() if count) or "-"
        by += f"; {row.unverified} not verified" if row.unverified else ""
        by += f"; {len(row.fragile)} fragile" if row.fragile else ""
        by += f"; median L2 {row.median_distance:.4g}" if row.median_distance is not None else ""
        where = f"{row.norm} {radius(row.eps)}"
        passes = f"{row.queries + row.gradients:,}"
        lines.append([row.name, where, percent(row.robust), f"{row.robust.n:,}", by, passes])
    return ["attack", "threat model", "robust %", "n", "broken by", "passes"], lines


def table(record: CardRecord) -> str:
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
    return "\n".join(told)
