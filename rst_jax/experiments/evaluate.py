"""Measuring what was drawn: the paper's measure of every ticket, a few images to look at, and evaluation cards."""

import contextlib
from pathlib import Path

import numpy as np

from rst_jax.data import SplitImages
from rst_jax.evaluation.accuracy import ticket_record
from rst_jax.evaluation.card import finished, measure
from rst_jax.evaluation.classifier import of_ticket
from rst_jax.evaluation.programs import Programs
from rst_jax.evaluation.question import ask, examine
from rst_jax.evaluation.suites import make_suite
from rst_jax.experiments.run import Run
from rst_jax.experiments.transfer import Crossed, cross
from rst_jax.reports.card import load_card
from rst_jax.reports.results import read_gallery
from rst_jax.runtime.files import write_arrays
from rst_jax.runtime.mesh import from_main
from rst_jax.runtime.text import plain
from rst_jax.tickets.ticket import Ticket


def evaluate(run: Run) -> None:
    """Natural and robust accuracy of every ticket on the test images, and images for the report.

    Needs the tickets (`search`, `dense`).
    """
    tickets = run.tickets()
    run.say("evaluating on the test images")
    crossed = cross(run, tickets)
    for i, ticket in enumerate(tickets):
        flags = crossed.natural[i], crossed.robust[i, i], crossed.violations[i]
        run.keep(ticket.name, ticket_record(ticket, run.evaluator.attack_record, *flags))
    _gallery(run, tickets, crossed)


def _gallery(run: Run, tickets: list[Ticket], crossed: Crossed) -> None:
    """A few test images and their adversarial ones for the most robust ticket, for the report."""
    drawn = [i for i, ticket in enumerate(tickets) if ticket.kind == "scratch"]
    best = max(drawn, key=lambda i: tickets[i].origin.selection_robust or 0.0)
    path, stamp = run.workdir / "results" / "gallery.npz", f"{tickets[best].digest} {run.evaluator.attack_record}"
    if from_main(np.asarray(_stamped(path) == stamp)):
        return
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
            "ticket": np.asarray(tickets[best].name),
            "stamp": np.asarray(stamp),
        }
        write_arrays(path, arrays)


def _stamped(path: Path) -> str:
    """Of which ticket and attack a gallery is; "" where there is none."""
    with contextlib.suppress(ValueError):
        return str(read_gallery(path).get("stamp", ""))
    return ""


def cards(run: Run) -> None:
    """The evaluation card of every ticket, where the configuration asks for one; programs are shared between them.

    A finished card stays as it is. Needs the tickets (`search`, `dense`).
    """
    c, test = run.config, run.dataset.test
    if c.evaluate.card == "pgd":
        return
    threat, images = run.evaluator.threat, SplitImages(test)
    programs = Programs(run.mesh, c.evaluate.batch_size)
    for ticket in run.tickets():
        folder = run.workdir / "results" / "cards" / f"{ticket.name}-{c.evaluate.card}"
        if not finished(folder, ticket.digest):
            run.say(f"{ticket.name}: the {c.evaluate.card} card")
            classifier = of_ticket(ticket)
            examples = examine(programs, classifier, images, images.labels, test.ids, threat)
            suite = make_suite(c.evaluate.card, threat, examples.image_shape)
            question = ask(programs, classifier, examples, threat, suite, run.key("evaluate"), c.dataset)
            measure(programs, question, folder)
        if run.is_main:
            run.say(f"{ticket.name}: {plain(load_card(folder).verdict)}")
