"""Finished tickets of a workdir as small files in a folder like zoo/, and the table beside the paper's figures.

    python benchmarks/keep.py runs/cifar10_r18 zoo --config configs/cifar10_r18.py

Copies each ticket that was evaluated and that the folder has not, with its record, and adds a line to index.json.
"""

import argparse
import datetime
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from rst_jax import records
from rst_jax.runtime import files
from rst_jax.runtime.text import check_name
from rst_jax.tickets.file import load_ticket

# PGD-20 accuracy of ResNet-18 on CIFAR-10 by remaining ratio, as read off Fig. 1 of the paper, %.
PAPER = {0.03: 43.9, 0.05: 45.8, 0.07: 47.0, 0.1: 47.0, 0.15: 47.2, 0.2: 47.8, 0.4: 46.8, 0.6: 45.8}


def keep(workdir: Path, zoo: Path, config: str) -> list[dict[str, Any]]:
    """Copy finished tickets and records that the zoo has not, and bring its index up to date."""
    began = json.loads((workdir / "config.json").read_text())["provenance"]["created"]
    index_path = zoo / "index.json"
    index = json.loads(index_path.read_text()) if index_path.exists() else []
    for path in sorted((workdir / "results").glob("ratio-*.json")):
        record = records.read_json(path, records.TicketRecord)
        if any(row["digest"] == record.digest for row in index):
            continue
        name = f"{record.dataset}-{record.model}-{record.remaining_ratio:g}-{record.digest[:8]}"
        check_name(name)
        zoo.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(workdir / "tickets" / f"{record.name}.ticket", zoo / f"{name}.ticket")
        shutil.copyfile(path, zoo / f"{name}.json")
        load_ticket(zoo / f"{name}.ticket")
        row = {
            "file": f"{name}.ticket",
            "digest": record.digest,
            "model": record.model,
            "dataset": record.dataset,
            "remaining_ratio": record.remaining_ratio,
            "natural": record.natural.value,
            "robust": record.robust.value,
            "attack": f"{record.attack.name}, {record.attack.norm} eps {record.attack.eps:.5g}",
            "n": record.robust.n,
            "seed": record.seed,
            "epoch": record.best_epoch,
            "config": config,
            "hardware": record.provenance.hardware,
            "seconds_until_here": _seconds(began, record.provenance.created),
        }
        index.append(row)
        files.write_json(index_path, index)
    return index


def table(index: list[dict[str, Any]]) -> str:
    """Measured beside published, %."""
    lines = ["model         dataset   ratio  natural  robust  paper  attack"]
    for row in sorted(index, key=lambda r: (r["model"], r["remaining_ratio"])):
        comparable = (row["model"], row["dataset"]) == ("resnet18", "cifar10")
        published = PAPER.get(row["remaining_ratio"]) if comparable else None
        lines.append(
            f"{row['model']:12}  {row['dataset']:8}  {row['remaining_ratio']:5g}  {100 * row['natural']:7.1f}"
            f"  {100 * row['robust']:6.1f}  {published or '':>5}  {row['attack']}, n {row['n']}"
        )
    return "\n".join(lines)


def _seconds(began: str, ended: str) -> float:
    """Between the run's last change of configuration and a record, by the clock: pauses count."""
    moments = [datetime.datetime.fromisoformat(moment) for moment in (began, ended)]
    return round((moments[1] - moments[0]).total_seconds(), 1)


def main() -> int:
    """Copy, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("zoo", type=Path)
    parser.add_argument("--config", default="", help="the file that the workdir was drawn with, for the index")
    args = parser.parse_args()
    if not (args.workdir / "config.json").exists():
        parser.error(f"{args.workdir} holds no run")
    index = keep(args.workdir, args.zoo, args.config)
    print(table(index) if index else "no ticket is finished yet")
    return 0


if __name__ == "__main__":
    sys.exit(main())
