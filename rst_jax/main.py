"""The command: `python -m rst_jax.main --config=configs/digits.py --workdir=runs/digits`.

It draws tickets and measures them, or does one part of that (`--config.task`). Started again on the same workdir it
goes on where it stopped. Exit codes: 0 done; 1 the run failed; 2 the command, the configuration or the data
are not right, and nothing was touched; 75 stopped before the end, by SIGTERM or because another process was lost, and
the same command goes on.
"""

import difflib
import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags

from rst_jax import config as config_lib
from rst_jax.cli import commands
from rst_jax.evaluation.accuracy import ticket_record
from rst_jax.evaluation.card import measure
from rst_jax.evaluation.cascade import Driver
from rst_jax.evaluation.classifier import of_ticket
from rst_jax.experiments import search
from rst_jax.experiments.run import Run, claimed, name_of
from rst_jax.experiments.transfer import Crossed, cross, transfer_record
from rst_jax.planning import plan
from rst_jax.reports.report import read_results, table, write_report
from rst_jax.runtime import preemption
from rst_jax.runtime.files import write_arrays, write_json
from rst_jax.runtime.progress import make_say
from rst_jax.tickets.r2s import load_r2s, r2s_record
from rst_jax.tickets.ticket import Ticket

_USAGE = """usage: python -m rst_jax.main --config=configs/digits.py [--workdir=DIR] [--config.FIELD=VALUE ...]

  --config            a file in configs/; configs/base.py explains every field
  --workdir           where everything is written (default: runs/<name of the config>)
  --config.task       draw (default) | search | evaluate | transfer | r2s | report
  evaluate, show      as the first word: an evaluation card of a ticket, and a look at one; see evaluate --help
  plan                as the first word: what the configuration will cost on TPUs or GPUs; see plan --help
  --coordinator, --num_processes, --process_id
                      several processes (jax.distributed): the address of process 0 as HOST:PORT, how many, which;
                      --coordinator=auto where the cluster tells (TPU pods, SLURM)
"""
_LOST_AFTER = 60  # seconds without a sign of life from a process, after which the others end
_PLAN_USAGE = """usage: python -m rst_jax plan --config=FILE --topology=v5e:4x4 [--json=FILE] [--config.FIELD=VALUE ...]

Compiles the search step for a TPU topology without a TPU (needs libtpu: pip install "jax[tpu]"; minutes) and predicts
memory, collectives, times and chip-hours from published rates. For GPUs (--topology=h200:8) by formula.
"""
_FRACTION = re.compile(r"^(--?config\.[\w.]+=)(\d+(?:\.\d+)?)/(\d+(?:\.\d+)?)$")  # --config.threat.eps=8/255


def main(argv: list[str] | None = None) -> None:
    """Run the command; ends the process with its exit code."""
    sys.exit(run_command(sys.argv if argv is None else argv))


def run_command(argv: list[str]) -> int:
    """The command as a function: its exit code; errors are told on standard error in a sentence."""
    if argv[1:2] == ["plan"]:
        return _plan([argv[0], *argv[2:]])
    if argv[1:2] in (["evaluate"], ["show"]):
        return _word(argv[1], argv[2:])
    if any(a in ("-h", "--help", "-help", "--helpfull") for a in argv[1:]):
        print(_USAGE)
        return 0
    try:
        config, options = _parse(argv)
        if error := _connect(options):
            return _fail(error, preemption.EXIT_CODE)
        preemption.listen()
        _set_up_compilation_cache(config.compilation_cache)
        workdir = Path(options["workdir"])
        say = make_say(jax.process_index() == 0)
        run = Run(config, workdir, say)
        run.check_init()
        with claimed(workdir, run):
            return _work(run)
    except (ValueError, OSError) as error:
        return _fail(error, 2)


def _word(word: str, arguments: list[str]) -> int:
    """`evaluate` and `show`."""
    try:
        _set_up_compilation_cache("~/.cache/rst_jax")
        commands.run(word, arguments)
    except preemption.Preempted:
        return _fail("stopped by SIGTERM; the same command goes on from here.", preemption.EXIT_CODE)
    except KeyboardInterrupt:
        return _fail("stopped; the same command goes on from the last finished batch.", 1)
    except ValueError as error:
        return _fail(error, 2)
    except OSError as error:  # a full disk, for instance
        return _fail(f"{error}; the same command goes on from the last finished batch.", 1)
    except SystemExit as done:  # --help
        return int(done.code or 0)
    return 0


def _plan(argv: list[str]) -> int:
    """`plan --config=FILE --topology=v5e:4x4 [--json=FILE]`: what the configuration will cost there."""
    if any(a in ("-h", "--help") for a in argv[1:]):
        print(_PLAN_USAGE)
        return 0
    topology, rest = _take_option(argv, "topology")
    out, rest = _take_option(rest, "json")
    try:
        if topology is None:
            raise ValueError("expected --topology=CHIP:COUNT, for instance --topology=v5e:4x4 or --topology=h200:8.")
        config, _ = _parse(rest)
        made = plan.make_plan(config, topology)
    except ValueError as error:
        return _fail(error, 2)
    print(plan.table(made))
    if out:
        write_json(Path(out), plan.to_dict(made))
    return 0


def _work(run: Run) -> int:
    try:
        draw(run)
    except preemption.Preempted:
        return _fail("stopped by SIGTERM; the same command goes on from here.", preemption.EXIT_CODE)
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or "RESOURCE_EXHAUSTED" in str(error):
            return _fail(error, 1)
        return _fail(f"another process was lost ({error}); start all of them again.", preemption.EXIT_CODE)
    except (ValueError, FloatingPointError, OSError) as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail("stopped; the same command goes on from the last checkpoint.", 1)
    return 0


def _fail(error: Any, code: int) -> int:
    print(f"rst_jax: {error}", file=sys.stderr)
    return code


def draw(run: Run) -> None:
    """The parts that `config.task` asks for, in order."""
    task = run.config.task
    if task in ("draw", "search"):
        search.search(run)
    if task == "search":
        return
    if task != "report":
        tickets = run.tickets()
        run.say("evaluating on the test images")
        crossed = cross(run.evaluator, tickets, run.dataset, run.workdir / "results" / "flags")
        _evaluate(run, tickets, crossed)
        if task in ("draw", "transfer"):
            _transfer(run, tickets, crossed)
        if task in ("draw", "r2s"):
            _switch(run, tickets, crossed)
        _gallery(run, tickets, crossed)
        if run.config.evaluate.card != "pgd":
            _cards(run, tickets)
    if run.is_main:
        names = [name_of(r) for r in sorted(run.config.remaining_ratios)] + ["dense"]
        results = read_results(run.workdir, names)
        page = write_report(run.workdir, results)
        print(f"\n{table(results)}\n\nreport: {page}")


def _evaluate(run: Run, tickets: list[Ticket], crossed: Crossed) -> None:
    for i, ticket in enumerate(tickets):
        record = ticket_record(
            ticket, run.evaluator.attack_record, crossed.natural[i], crossed.robust[i, i], crossed.violations[i]
        )
        _keep(run, ticket.meta["name"], record)


def _keep(run: Run, name: str, record: Any) -> None:
    if run.is_main:
        write_json(run.workdir / "results" / f"{name}.json", record)


def _drawn(tickets: list[Ticket]) -> list[Ticket]:
    return [t for t in tickets if t.meta["name"] != "dense"]


def _transfer(run: Run, tickets: list[Ticket], crossed: Crossed) -> None:
    _keep(run, "transfer", transfer_record(crossed, _drawn(tickets), run.evaluator))


def _switch(run: Run, tickets: list[Ticket], crossed: Crossed) -> None:
    defence = load_r2s(run.workdir / "checkpoints" / "tickets")
    by_name = {t.meta["name"]: t for t in defence.tickets}
    drawn = _drawn(tickets)
    for ticket in drawn:
        stored = by_name.get(ticket.meta["name"])
        if stored is None or stored.digest != ticket.digest:
            raise ValueError(
                f"{run.workdir}: {ticket.meta['name']} is not the same in tickets/ and checkpoints/tickets; "
                "run --config.task=search, which writes the latter again."
            )
    record = r2s_record(crossed, drawn, np.full(len(drawn), 1 / len(drawn)), run.evaluator)
    _keep(run, "r2s", record)


def _gallery(run: Run, tickets: list[Ticket], crossed: Crossed) -> None:
    """A few test images and their adversarial ones for the most robust ticket, for the report."""
    best = max(range(len(_drawn(tickets))), key=lambda i: tickets[i].meta["selection_robust"])
    adversarial = crossed.shown[best]
    clean, labels, _ = run.dataset.test.batch(crossed.shown_index[best])
    said = [np.argmax(run.evaluator.logits(tickets[best].variables, x), -1) for x in (clean, adversarial)]
    if run.is_main:
        arrays = {
            "clean": clean,
            "adversarial": adversarial,
            "labels": labels,
            "clean_prediction": said[0],
            "adversarial_prediction": said[1],
            "names": np.asarray(run.dataset.class_names),
            "ticket": np.asarray(tickets[best].meta["name"]),
        }
        write_arrays(run.workdir / "results" / "gallery.npz", arrays)


def _cards(run: Run, tickets: list[Ticket]) -> None:
    """The evaluation card of every ticket; programs are shared between them."""
    c, data = run.config, run.dataset
    images, labels, ids = data.test.batch()
    driver = Driver(run.mesh, c.evaluate.batch_size, run.key("evaluate"))
    for ticket in tickets:
        name = ticket.meta["name"]
        run.say(f"{name}: the {c.evaluate.card} card")
        card = measure(
            driver,
            of_ticket(ticket),
            images,
            labels,
            ids,
            run.evaluator.threat,
            attacks=c.evaluate.card,
            folder=run.workdir / "results" / "cards" / f"{name}-{c.evaluate.card}",
            name=name,
            subject_digest=ticket.digest,
            dataset=c.dataset,
        )
        run.say(f"{name}: {card.record.verdict}")


def _parse(argv: list[str]) -> tuple[config_lib.Config, dict[str, Any]]:
    """The checked configuration and the other options of a command line.

    Raises:
      ValueError: anything that is not right, in one sentence.
    """
    named, rest = _take_option(argv[1:], "config")
    if named is None:
        raise ValueError("expected --config=FILE, for instance --config=configs/digits.py; --help tells more.")
    path = Path(named)
    if not path.is_file():
        raise ValueError(f"there is no config file {path}.{_near_file(path)}")
    for argument in rest:
        field = argument.lstrip("-").split("=", 1)[0]
        if field.startswith("config.") and field.removeprefix("config.") not in config_lib.field_names():
            raise ValueError(config_lib.unknown_field(field.removeprefix("config."), config_lib.field_names()))
    rest = [_FRACTION.sub(_divided, argument) for argument in rest]
    values = flags.FlagValues()
    config_flag = config_flags.DEFINE_config_dict(
        "config", _load_config(path), flag_values=values, sys_argv=[argv[0], *rest]
    )
    flags.DEFINE_string("workdir", None, "where everything is written", flag_values=values)
    flags.DEFINE_string("coordinator", None, "address of process 0, or auto", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "how many processes", flag_values=values)
    flags.DEFINE_integer("process_id", None, "which process this is", flag_values=values)
    try:
        rest = values([argv[0], *rest], known_only=False)
    except (flags.Error, ValueError, TypeError) as error:
        raise ValueError(f"{error}; --help tells more.") from error
    if len(rest) > 1:
        raise ValueError(f"expected options only, each as --name=value; got {' '.join(rest[1:])!r}.")
    config = config_lib.from_dict(config_flag.value)
    options = {name: values[name].value for name in ("coordinator", "num_processes", "process_id")}
    return config, {**options, "workdir": values.workdir or f"runs/{path.stem}"}


def _divided(match: re.Match[str]) -> str:
    return f"{match[1]}{float(match[2]) / float(match[3])!r}"


def _take_option(arguments: list[str], name: str) -> tuple[str | None, list[str]]:
    """The last value of --name=value or --name value, and the other arguments."""
    value, rest, waiting = None, [], iter(arguments)
    for argument in waiting:
        option, equals, given = argument.partition("=")
        if argument.startswith("-") and option.lstrip("-") == name:
            value = given if equals else next(waiting, "")
        else:
            rest.append(argument)
    return value, rest


def _load_config(path: Path) -> Any:
    """What get_config() of a config file returns; the file may import from the folder that its own folder lies in."""
    spec = importlib.util.spec_from_file_location("rst_jax_config", path)
    sys.path.insert(0, str(path.resolve().parent.parent))
    try:
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        spec.loader.exec_module(module)  # type: ignore[union-attr]
        return module.get_config()
    except Exception as error:  # the file is somebody's Python
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)


def _near_file(path: Path) -> str:
    there = sorted(p.name for p in path.parent.glob("*.py") if p.name != "base.py") if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, there, n=1, cutoff=0.5)
    return f" Did you mean {path.parent / near[0]}?" if near else f" There are: {', '.join(there)}." if there else ""


def _connect(options: dict[str, Any]) -> str | None:
    """Join the other processes; why that failed, or None.

    Raises:
      ValueError: an option is missing.
    """
    if options["coordinator"] is None:
        return None
    names = {"coordinator": "coordinator_address", "num_processes": "num_processes", "process_id": "process_id"}
    where = {} if options["coordinator"] == "auto" else {to: options[name] for name, to in names.items()}
    if None in where.values():
        raise ValueError("--coordinator=HOST:PORT needs --num_processes and --process_id.")
    try:
        jax.distributed.initialize(**where, heartbeat_timeout_seconds=_LOST_AFTER)
    except RuntimeError as error:
        return f"the processes could not join at {options['coordinator']}: {error}"
    return None


def _set_up_compilation_cache(folder: str) -> None:
    if folder and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


if __name__ == "__main__":
    main()
