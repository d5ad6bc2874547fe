"""Tickets on CIFAR-10 within a time limit, beside the paper's figures; called again it goes on.

    python benchmarks/reproduce.py --minutes 9 --workdir runs/reproduce --config.data_dir=DIR

Draws one ratio after the other through the project's own command (configs/cifar10_r18.py unless --config says
otherwise), which SIGTERM stops with its state saved when the time is over. After each it copies what is finished to
--zoo, as small files: the ticket, its record, and a line in index.json; and prints the table. Other options go to the
command as they are, for instance --config.dataset=npz --config.data_path=FILE.npz. Exit codes: 0 all ratios are drawn,
75 call it again, others as the command's.
"""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rst_jax import records
from rst_jax.experiments.run import name_of
from rst_jax.runtime import files
from rst_jax.tickets.file import load_ticket

ROOT = Path(__file__).parent.parent
# PGD-20 accuracy of ResNet-18 on CIFAR-10 by remaining ratio, as read off Fig. 1 of the paper, %.
PAPER = {0.03: 43.9, 0.05: 45.8, 0.07: 47.0, 0.1: 47.0, 0.15: 47.2, 0.2: 47.8, 0.4: 46.8, 0.6: 45.8}
ORDER = (0.1, 0.05, 0.2, 0.4, 0.03, 0.07, 0.15, 0.6)
AGAIN = 75
_TO_SAVE = 60  # seconds kept for stopping: a compilation or an evaluation may have to end first


def command(config: Path, workdir: Path, ratios: list[float], rest: list[str]) -> list[str]:
    """The project's command for the ratios drawn so far and the next."""
    drawn = ",".join(f"{r:g}" for r in ratios)
    options = [f"--config={config}", f"--workdir={workdir}", f"--config.remaining_ratios=({drawn},)"]
    return [sys.executable, "-m", "rst_jax.main", *options, "--config.dense.train=False", *rest]


def run_until(deadline: float, words: list[str]) -> int:
    """Run a command; at the deadline (time.monotonic) it gets SIGTERM. Its exit code."""
    process = subprocess.Popen(words, cwd=ROOT)
    try:
        return process.wait(max(deadline - time.monotonic(), 0.0))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        return process.wait()


def keep(workdir: Path, zoo: Path, config: str, seconds: float) -> list[dict[str, Any]]:
    """Copy finished tickets and records that the zoo has not, and bring its index up to date."""
    index_path = zoo / "index.json"
    index = json.loads(index_path.read_text()) if index_path.exists() else []
    for path in sorted((workdir / "results").glob("ratio-*.json")):
        record = records.read_json(path, records.TicketRecord)
        if any(row["digest"] == record.digest for row in index):
            continue
        name = f"{record.dataset}-{record.model}-{record.remaining_ratio:g}-{record.digest[:8]}"
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
            "seconds_until_here": round(seconds, 1),
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


def main() -> int:
    """Parse, draw until the time is over, keep, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--minutes", type=float, required=True, help="of this call")
    parser.add_argument("--config", type=Path, default=Path("configs/cifar10_r18.py"))
    parser.add_argument("--workdir", type=Path, default=Path("runs/reproduce"))
    parser.add_argument("--zoo", type=Path, default=Path("zoo"))
    parser.add_argument("--ratios", type=float, nargs="+", default=list(ORDER), help="in the order to draw them")
    args, rest = parser.parse_known_args()
    for option in rest:
        if not option.startswith("--config."):
            parser.error(f"unknown option {option}; fields of the configuration are --config.FIELD=VALUE")
    start = time.monotonic()
    deadline = start + 60 * args.minutes - _TO_SAVE
    spent_path = args.workdir.with_name(args.workdir.name + "-seconds")
    before = float(spent_path.read_text()) if spent_path.exists() else 0.0
    index: list[dict[str, Any]] = []
    code = AGAIN
    for count in range(1, len(args.ratios) + 1):
        drawn = args.ratios[:count]
        if time.monotonic() >= deadline and not (args.workdir / "results" / f"{name_of(drawn[-1])}.json").exists():
            code = AGAIN
            break
        code = run_until(deadline, command(args.config, args.workdir.absolute(), drawn, rest))
        spent = before + time.monotonic() - start
        spent_path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(spent_path, f"{spent:.1f}\n")
        index = keep(args.workdir, args.zoo, str(args.config), spent)
        if code:
            break
    print(f"\n{table(index)}\n" if index else "\nno ticket is finished yet\n")
    if code == AGAIN:
        print(f"{spent_path.read_text().strip() if spent_path.exists() else 0} s so far; the same command goes on")
    return code


if __name__ == "__main__":
    sys.exit(main())
