"""The command: `python -m rst_jax.main --config=configs/digits.py --workdir=runs/digits`.

It draws tickets and measures them, or does parts of that (`--config.stages`). Started again on the same workdir it
goes on where it stopped. Exit codes: 0 done; 1 the work failed; 2 the command, the configuration or the data
are not right, and nothing was touched; 75 stopped before the end, by SIGTERM (from the first line on), because its
minutes were over or because another process was lost, and the same command goes on. Ctrl-C ends it with 1.
"""

import os
import sys
from collections.abc import Callable, Sequence

from rst_jax.runtime import preemption, work
from rst_jax.runtime.preemption import EXIT_CODE as GOES_ON
from rst_jax.runtime.preemption import Preempted
from rst_jax.runtime.text import lines, show
from rst_jax.runtime.work import Failed, Lost

_USAGE = """usage: python -m rst_jax.main --config=configs/digits.py [--workdir=DIR] [--config.FIELD=VALUE ...]
       python -m rst_jax WORD ...

The words, each with --help:
"""
# How it may end other than well: what was raised, the exit code, and what is said of it.
_ENDS: tuple[tuple[tuple[type[BaseException], ...], int, str], ...] = (
    ((Preempted,), GOES_ON, "{}; the same command goes on from here."),
    ((Lost,), GOES_ON, "{}"),
    ((Failed,), 1, "{}"),
    ((KeyboardInterrupt,), 1, "stopped; the same command goes on from what was last saved."),
    ((ValueError, OSError), 2, "{}"),
)


def main(argv: list[str] | None = None) -> None:
    """Run the command; ends the process with its exit code."""
    preemption.catch(_end)
    work.quiet()
    code = run_command(sys.argv if argv is None else argv)
    work.ends_with(code)
    sys.exit(code)


def _end(error: BaseException) -> None:
    """End the process at once, wherever it is."""
    code, told = _ending(error)
    os.write(2, f"{lines(told)}\n".encode())
    os._exit(code)


def _ending(error: BaseException) -> tuple[int, str]:
    """The exit code, and the sentence."""
    code, says = next((code, says) for kinds, code, says in _ENDS if isinstance(error, kinds))
    return code, f"rst_jax: {says.format(error)}"


def run_command(argv: list[str]) -> int:
    """The command as a function: its exit code; errors are told on standard error in a sentence."""
    first, *rest = argv[1:] or [""]
    try:
        if first in ("-h", "--help"):
            show(_USAGE + "\n".join(f"  {word:10}{says}" for word, (says, _) in WORDS.items()))
        elif first in WORDS:
            WORDS[first][1](rest)
        elif first and first[0] != "-":
            from rst_jax.config import near

            raise ValueError(f"there is no word {first!r}; {near(first, WORDS, '--help lists them.')}")
        else:
            _draw(argv[1:])
    except SystemExit as done:  # --help of a word
        return int(done.code or 0)
    except tuple(kind for kinds, _, _ in _ENDS for kind in kinds) as error:
        code, told = _ending(error)
        show(told, sys.stderr)
        return code
    return 0


def _draw(arguments: Sequence[str]) -> None:
    """A run, or the points of a sweep."""
    from rst_jax.cli import draw as command
    from rst_jax.experiments import draw, sweep

    asked = command.read(arguments)
    file = asked.file
    points = sweep.expand(file.points, file.config, file.typed, file.figure) if file.points is not None else []
    config = points[0].config if points else file.config()
    taken = sweep.take(points, asked.sweep_index)
    work.connect(asked.coordinator, asked.num_processes, asked.process_id)
    work.find_devices()
    preemption.listen(asked.minutes)
    work.keep_programs(config.compilation_cache)
    with work.at_work(()):  # another process may be lost anywhere
        if points:
            sweep.work(sweep.Sweep(file.name, asked.workdir, points, file.figure), taken)
        else:
            draw.start(config, asked.workdir)


def _evaluate(arguments: Sequence[str]) -> None:
    from rst_jax.cli import evaluate

    evaluate.run(arguments)


def _show(arguments: Sequence[str]) -> None:
    from rst_jax.cli import show

    show.run(arguments)


def _plan(arguments: Sequence[str]) -> None:
    from rst_jax.cli import plan

    plan.run(arguments)


WORDS: dict[str, tuple[str, Callable[[Sequence[str]], None]]] = {
    "draw": ("draw tickets and measure them; the word may be left out", _draw),
    "evaluate": ("an evaluation card of a ticket", _evaluate),
    "show": ("an evaluation card on the terminal", _show),
    "plan": ("what a configuration will cost on TPUs or GPUs", _plan),
}


if __name__ == "__main__":
    main()
