"""`show`: an evaluation card on the terminal."""

from collections.abc import Sequence

from rst_jax.cli.options import Parser
from rst_jax.runtime.text import plain, show


def run(arguments: Sequence[str]) -> None:
    """The arguments after the word.

    Raises:
      ValueError: what is not right, in a sentence.
    """
    parser = Parser("show", "Print an evaluation card.")
    parser.add_argument("card", help="its folder, or its card.json")
    parser.add_argument("--checks", action="store_true", help="also every check, with what was measured")
    o = parser.parse(arguments)
    from rst_jax.reports.card import card_text, load_card

    record = load_card(o.card)
    show(card_text(record))
    if o.checks:
        for check in record.checks:
            show(plain(f"{'passed' if check.passed else 'FAILED'}  {check.name}: {check.measured}"))
