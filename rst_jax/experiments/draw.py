"""Drawing: the stages of a run, by name.

A stage takes the run and returns nothing. It writes whole files and does nothing where they are there for the same
digests, names the stage that it misses, and passes a preemption point between its units.
"""

from collections.abc import Callable
from pathlib import Path

from rst_jax.config import Config
from rst_jax.experiments.evaluate import cards, evaluate
from rst_jax.experiments.run import Run
from rst_jax.experiments.search import dense, search
from rst_jax.experiments.switching import switch
from rst_jax.experiments.transfer import transfer
from rst_jax.reports.report import report_text, write_report
from rst_jax.reports.results import read_results
from rst_jax.runtime.mesh import is_main
from rst_jax.runtime.progress import make_say
from rst_jax.runtime.text import show
from rst_jax.runtime.work import at_work


def report(run: Run) -> None:
    """The page and the table of all that the workdir has recorded.

    Needs the records (`evaluate`).
    """
    if run.is_main:
        results = read_results(run.workdir, list(run.names))
        page = write_report(run.workdir, results)
        show(f"\n{report_text(results)}\n\nreport: {page}")


STAGES: dict[str, Callable[[Run], None]] = {
    "search": search,
    "dense": dense,
    "evaluate": evaluate,
    "transfer": transfer,
    "r2s": switch,
    "cards": cards,
    "report": report,
}


def draw(run: Run) -> None:
    """The stages that the configuration names, in its order."""
    for name in run.config.stages:
        STAGES[name](run)


def start(config: Config, workdir: Path) -> None:
    """Draw in a workdir, checked and held.

    Raises:
      ValueError: it cannot be run; nothing was written. Preempted, Failed, Lost: it ended before its end.
    """
    run = Run(config, workdir, make_say(is_main()))
    run.check()
    with run.claim.held(), at_work():
        draw(run)
