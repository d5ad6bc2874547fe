"""The words of the command that need no configuration: `evaluate` and `show`."""

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import jax
import numpy as np

from rst_jax.data import load_test
from rst_jax.evaluation.card import evaluate, replay
from rst_jax.reports.card import load_card, table, write_card_page
from rst_jax.runtime import preemption
from rst_jax.runtime.mesh import split_cpu
from rst_jax.threat import ThreatModel
from rst_jax.tickets.file import load_ticket
from rst_jax.tickets.r2s import load_r2s
from rst_jax.tickets.ticket import Ticket


class _Parser(argparse.ArgumentParser):
    """Errors in one sentence, raised."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; {self.prog} --help tells more.")


def run(word: str, arguments: Sequence[str]) -> None:
    """`evaluate ...` or `show ...`, as typed.

    Raises:
      ValueError: what is not right, in a sentence.
      Preempted: asked to stop; the same command goes on.
    """
    {"evaluate": _evaluate, "show": _show}[word](arguments)


def _evaluate(arguments: Sequence[str]) -> None:
    parser = _Parser("python -m rst_jax evaluate", description="Measure a ticket's robustness: the evaluation card.")
    add = parser.add_argument
    add("ticket", help="a .ticket file, a workdir, or a checkpoints/tickets folder")
    add("--name", default="", help="which ticket of such a folder, for instance ratio-0.1")
    add("--dataset", default="", help="digits, npz or a TFDS name; its test images are attacked")
    add("--data_dir", default="~/tensorflow_datasets", help="where TFDS datasets lie (default: %(default)s)")
    add("--data_path", default="", help="the .npz file of --dataset npz")
    add("--attacks", default="autoattack", help="full, or names with commas between (default: %(default)s)")
    add("--norm", choices=("linf", "l2"), default="linf")
    add("--eps", type=_fraction, required=False, help="radius in [0, 1] image units, for instance 8/255")
    add("--eps_l2", type=_fraction, default=0.5, help="radius of the L2 row of full (default: %(default)s)")
    add("--examples", type=int, default=0, help="only the first so many test images")
    add("--batch_size", type=int, default=250)
    add("--seed", type=int, default=0)
    add("--faithful", action="store_true", help="keep the published attacks' quirks, for comparison")
    add("--keep_images", action="store_true", help="also write the adversarial images")
    add("--replay", default="", help="a card's folder: classify its adversarial images instead of making new ones")
    add("--out", default="", help="the card's folder (default: below cards/, named after all that is asked)")
    _know(parser, arguments)
    o = parser.parse_args(arguments)
    split_cpu()
    ticket = _ticket(o.ticket, o.name)
    if o.replay:
        print(f"{ticket.name} ({ticket.digest[:12]}) on the images of {o.replay}:")
        for row, (right, n) in replay(ticket, o.replay).items():
            print(f"{row}: {100 * right:.1f} % of {n:,}")
        return
    if not o.dataset:
        raise ValueError("expected --dataset: digits, npz or a TFDS name.")
    if o.eps is None:
        raise ValueError("expected --eps, the radius of the threat model, for instance --eps 8/255.")
    if o.norm == "linf" and not 0 <= o.eps <= 1:
        raise ValueError(f"--eps must lie in [0, 1], as images do; got {o.eps:g}. Write eight pixel levels as 8/255.")
    for name in ("batch_size", "examples", "seed"):
        if (value := getattr(o, name)) < (name == "batch_size"):
            raise ValueError(f"--{name} must be at least {int(name == 'batch_size')}; got {value}.")
    images, labels, ids = load_test(o.dataset, o.data_dir, o.data_path, o.examples)
    if images.shape[1:] != tuple(ticket.image_shape):
        raise ValueError(
            f"the ticket takes images {list(ticket.image_shape)}; {o.dataset} has {list(images.shape[1:])}."
        )
    stem = ticket.name
    asked = [stem, ticket.digest[:8], o.dataset, o.attacks.replace(",", "+"), o.norm, f"{o.eps:.4g}"]
    asked += [f"first{o.examples}"] * bool(o.examples) + [f"seed{o.seed}"] * bool(o.seed) + ["faithful"] * o.faithful
    out = Path(o.out or f"cards/{'-'.join(asked)}")
    preemption.listen()
    card = evaluate(
        ticket,
        images,
        labels,
        ThreatModel(o.eps, o.norm),
        o.attacks.split(","),
        jax.random.key(o.seed),
        batch_size=o.batch_size,
        faithful=o.faithful,
        eps_l2=o.eps_l2,
        folder=out,
        keep_images=o.keep_images,
        ids=ids,
        dataset=o.dataset,
    )
    print(f"{card}\n\ncard: {out / 'card.json'}, {write_card_page(out)}")


def _show(arguments: Sequence[str]) -> None:
    parser = _Parser("python -m rst_jax show", description="Print an evaluation card.")
    parser.add_argument("card", help="its folder, or its card.json")
    parser.add_argument("--checks", action="store_true", help="also every check, with what was measured")
    _know(parser, arguments)
    o = parser.parse_args(arguments)
    record = load_card(o.card)
    print(table(record))
    if o.checks:
        for check in record.checks:
            print(f"{'passed' if check.passed else 'FAILED'}  {check.name}: {check.measured}")


def _know(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """Refuse an option that does not exist, naming the nearest one."""
    known = [option for action in parser._actions for option in action.option_strings]
    for argument in arguments:
        option = argument.split("=")[0]
        if option.startswith("--") and option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            parser.error(f"there is no option {option}" + (f", did you mean {near[0]}?" if near else ""))


def _ticket(path: str, name: str) -> Ticket:
    folder = Path(path)
    if not folder.is_dir():
        return load_ticket(path)
    drawn = sorted((folder / "tickets").glob("*.ticket"))
    there = {t.name: t for t in (map(load_ticket, drawn) if drawn else load_r2s(path).tickets)}
    if name not in there:
        got = f"there is no {name!r}" if name else "it holds several tickets"
        raise ValueError(f"{path}: {got}; take --name with one of {', '.join(there)}.")
    return there[name]


def _fraction(text: str) -> float:
    above, _, below = text.partition("/")
    try:
        value = float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError):
        value = float("nan")
    if not np.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a number or a fraction such as 8/255; got {text!r}")
    return value
