"""What `draw`, the word without a name, is asked."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from rst_jax.cli.config_file import ConfigFile
from rst_jax.cli.options import Parser, add_sweep_index, config_file, sweep_index, within
from rst_jax.ranges import Count, Minutes, Positive
from rst_jax.runtime.paths import local_path

_DESCRIPTION = """Draw tickets and measure them, or do parts of that. Started again it goes on where it stopped.

A config file may define a sweep: its points are drawn one after the other below the workdir, and the same command on
several machines shares them (the workdir on storage that keeps locks between them); it ends when all are finished, and
waits for those that others still draw.

  --config.FIELD=VALUE  any field, for instance --config.threat.eps=8/255 or --config.remaining_ratios='(0.05,0.1)'
  --config.stages       which parts: search, dense, evaluate, transfer, r2s, cards, report (default: all)"""
_USAGE = "python -m rst_jax.main --config=configs/digits.py [--workdir=DIR] [--config.FIELD=VALUE ...]"


@dataclasses.dataclass(frozen=True)
class Asked:
    """A command line of `draw`, read; `minutes` and `sweep_index` are None where not given.

    Attributes:
      coordinator: address of process 0, "auto" where the cluster tells, or None for one process.
    """

    file: ConfigFile
    workdir: Path
    sweep_index: int | None
    minutes: float | None
    coordinator: str | None
    num_processes: int | None
    process_id: int | None


def read(arguments: Sequence[str]) -> Asked:
    """The arguments after the word.

    Raises:
      ValueError: anything that is not right, in one sentence.
    """
    parser = Parser("draw", _DESCRIPTION, usage=_USAGE)
    parser.add_config()
    add_sweep_index(parser)
    add = parser.add_argument
    add("--workdir", metavar="DIR", help="where everything is written (default: runs/ and the config's name)")
    add("--minutes", type=within(Minutes), help="stop in time to be over by then, saved; the same command goes on")
    add("--coordinator", metavar="HOST:PORT", help="of process 0 of several (jax.distributed); auto: the cluster tells")
    add("--num_processes", type=within(Positive), metavar="N", help="how many processes")
    add("--process_id", type=within(Count), metavar="I", help="which of them this is")
    o = parser.parse(arguments)
    file = config_file(o)
    if sweep_index(o) is not None and file.points is None:
        raise ValueError(f"{file.path} defines no sweep(), of which --config.sweep_index would take a point.")
    return Asked(
        file=file,
        workdir=local_path(o.workdir or f"runs/{file.name}"),
        sweep_index=sweep_index(o),
        minutes=o.minutes,
        coordinator=o.coordinator,
        num_processes=o.num_processes,
        process_id=o.process_id,
    )
