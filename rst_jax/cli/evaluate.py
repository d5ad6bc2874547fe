"""`evaluate`: an evaluation card of a ticket."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rst_jax.cli.options import Parser, refuse_unused, within
from rst_jax.ranges import Count, Length, Positive, Seed
from rst_jax.runtime import preemption, work
from rst_jax.runtime.mesh import split_cpu
from rst_jax.runtime.paths import local_path
from rst_jax.runtime.text import plain, show
from rst_jax.threat import ThreatModel

if TYPE_CHECKING:
    from rst_jax.tickets.ticket import Ticket


def run(arguments: Sequence[str]) -> None:
    """The arguments after the word.

    Raises:
      ValueError: what is not right, in a sentence.
      Preempted: asked to stop; the same command goes on.
      Failed: a file could not be written, for instance.
    """
    o = _parser().parse(arguments)
    work.keep_programs("~/.cache/rst_jax")
    with work.at_work(OSError, "; the same command goes on from the last finished batch."):
        _replay(o) if o.replay else _evaluate(o)


def _parser() -> Parser:
    parser = Parser("evaluate", "Measure a ticket's robustness: the evaluation card.")
    add = parser.add_argument
    add("ticket", help="a .ticket file, a workdir, or a checkpoints/tickets folder")
    add("--name", default="", help="which ticket of such a folder, for instance ratio-0.1")
    add("--dataset", default="", help="digits, npz or a TFDS name; its test images are attacked")
    add("--data_dir", default="~/tensorflow_datasets", help="where TFDS datasets lie (default: %(default)s)")
    add("--data_path", default="", help="of --dataset npz: an .npz file, or .npy images with labels.npy beside them")
    add("--attacks", default="autoattack", help="full, or names with commas between (default: %(default)s)")
    add("--norm", choices=("linf", "l2"), default="linf")
    add("--eps", type=within(Length), required=False, help="radius in [0, 1] image units, for instance 8/255")
    add("--eps_l2", type=within(Length), default=0.5, help="radius of the L2 row of full (default: %(default)s)")
    add("--examples", type=within(Count), default=0, help="only the first so many test images")
    add("--skip", type=within(Count), default=0, help="leave out so many before them; CIFAR-10-C: 10,000 a severity")
    add("--batch_size", type=within(Positive), default=250)
    add("--seed", type=within(Seed), default=0)
    add("--faithful", action="store_true", help="keep the published attacks' quirks, for comparison")
    add("--keep_images", action="store_true", help="also write the adversarial images")
    add("--replay", default="", help="a card's folder: classify its adversarial images instead of making new ones")
    add("--out", default="", help="the card's folder (default: below cards/, named after all that is asked)")
    return parser


def _replay(o: argparse.Namespace) -> None:
    """Another ticket on the adversarial images of a card."""
    from rst_jax.evaluation.replay import replay

    others = [name for name in vars(o) if name not in ("ticket", "name", "replay", "typed")]
    refuse_unused(o, others, "--replay classifies the images of a card as they are")
    split_cpu()
    work.find_devices()
    ticket = _ticket(o.ticket, o.name)
    show(f"{ticket.name} ({ticket.digest[:12]}) on the images of {o.replay}:")
    for row, (right, n) in replay(ticket, o.replay).items():
        show(f"{plain(row)}: {100 * right:.1f} % of {n:,}")


def _evaluate(o: argparse.Namespace) -> None:
    """The card of what is asked."""
    import jax

    from rst_jax.data import SplitImages, load_test
    from rst_jax.evaluation.card import evaluate
    from rst_jax.reports.card import write_card_page

    split_cpu()
    work.find_devices()
    ticket = _ticket(o.ticket, o.name)
    if not o.dataset:
        raise ValueError("expected --dataset: digits, npz or a TFDS name.")
    if o.eps is None:
        raise ValueError("expected --eps, the radius of the threat model, for instance --eps 8/255.")
    if o.norm == "linf" and not 0 <= o.eps <= 1:
        raise ValueError(f"--eps must lie in [0, 1], as images do; got {o.eps:g}. Write eight pixel levels as 8/255.")
    if o.dataset != "npz":
        refuse_unused(o, ["data_path"], "it is the file of --dataset npz")
    if o.dataset in ("npz", "digits"):
        refuse_unused(o, ["data_dir"], "it is where TFDS datasets lie")
    attacks = [name.strip() for name in o.attacks.split(",")]
    if o.norm == "l2" or not {"full", "autoattack-l2", "cw-l2"} & set(attacks):
        refuse_unused(o, ["eps_l2"], "no attack of another norm than --norm is asked for")
    images = SplitImages(load_test(o.dataset, o.data_dir, o.data_path, o.examples, o.skip))
    if (shape := images.split.images.shape[1:]) != tuple(ticket.image_shape):
        raise ValueError(f"the ticket takes images {list(ticket.image_shape)}; {o.dataset} has {list(shape)}.")
    images_of = Path(o.data_path).stem if o.data_path.endswith(".npy") else o.dataset
    asked = [ticket.name, ticket.digest[:8], images_of.replace("/", "-"), "+".join(attacks), o.norm]
    numbers = {"skip": o.skip, "first": o.examples, "seed": o.seed}
    asked += [f"{o.eps:.4g}", *(f"{word}{value}" for word, value in numbers.items() if value)]
    asked += ["faithful"] * o.faithful
    out = local_path(o.out or f"cards/{'-'.join(asked)}")
    preemption.listen()
    card = evaluate(
        ticket,
        images,
        images.labels,
        ThreatModel(o.eps, o.norm),
        attacks,
        jax.random.key(o.seed),
        batch_size=o.batch_size,
        faithful=o.faithful,
        eps_l2=o.eps_l2,
        folder=out,
        keep_images=o.keep_images,
        ids=images.split.ids,
        dataset=images_of,
    )
    show(f"{card}\n\ncard: {out / 'card.json'}, {write_card_page(out)}")


def _ticket(path: str, name: str) -> "Ticket":
    from rst_jax.tickets.file import load_ticket
    from rst_jax.tickets.r2s import load_r2s

    folder = local_path(path)
    if not folder.is_dir():
        if name:
            raise ValueError(f"--name has no effect here: {path} is one ticket; leave it out.")
        return load_ticket(path)
    drawn = sorted((folder / "tickets").glob("*.ticket"))
    there = {t.name: t for t in (map(load_ticket, drawn) if drawn else load_r2s(path).tickets)}
    if name not in there:
        got = f"there is no {name!r}" if name else "it holds several tickets"
        raise ValueError(f"{path}: {got}; take --name with one of {', '.join(there)}.")
    return there[name]
