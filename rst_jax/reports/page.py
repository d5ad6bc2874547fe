"""A self-contained page: its frame, its colours, and plots as SVG."""

import base64
import html
import io
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from rst_jax.runtime.text import plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED = "#1b2530", "#5c6b7a"
ROBUST, NATURAL = "#b3403a", "#2f6690"
CYCLE = ("#2f6690", "#b3403a", "#4f8a5b", "#c28a2c", "#6f5a9c", "#3a9aa3", "#8c6d5a", "#5c6b7a")


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light; }}
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1b2530; background: #fbfbf9; max-width: 60rem;
  margin: 0 auto; padding: 2rem 1rem; }}
h1 {{ font-size: 1.6rem; margin: 0 0 1rem; }} h2 {{ font-size: 1.1rem; margin: 0 0 .5rem; }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .35rem .6rem; border-bottom: 1px solid #dde2e6; text-align: right; }}
th:first-child, td:first-child {{ text-align: left; }} th {{ color: #5c6b7a; font-weight: 600; }}
.table {{ overflow-x: auto; }}
figure {{ margin: 2rem 0; padding: 1rem; background: #fff; border: 1px solid #e4e8eb; border-radius: 6px; }}
figure svg, figure img {{ display: block; max-width: 100%; height: auto; margin: 0 auto; }}
figcaption, footer {{ color: #5c6b7a; font-size: .85rem; }}
footer {{ overflow-wrap: anywhere; }}
</style></head><body>
<h1>{title}</h1>
{table}
{notes}
{sections}
<footer>{made}</footer>
</body></html>
"""


def render(
    title: str,
    header: list[str],
    rows: list[list[str]],
    notes: list[str],
    figures: list[tuple[str, str, str]],
    made: str,
) -> str:
    """The page.

    Args:
      title: plain text, like everything here but the pictures.
      header, rows: the table on top.
      notes: paragraphs below it.
      figures: (title, picture as markup, caption); those without a picture are left out.
      made: the last line: where and with what.
    """
    sections = "".join(
        f"<figure><h2>{_escaped(heading)}</h2>{picture}<figcaption>{_escaped(caption)}</figcaption></figure>"
        for heading, picture, caption in figures
        if picture
    )
    return _PAGE.format(
        title=_escaped(title),
        table=table_markup(header, rows),
        notes="".join(f"<p>{_escaped(note)}</p>" for note in notes),
        sections=sections,
        made=_escaped(made),
    )


def _escaped(text: str) -> str:
    return html.escape(plain(text))


def label(text: object) -> str:
    """A text as Matplotlib shows it: plainly, and "$" begins no formula."""
    return plain(text).replace("$", r"\$")


def table_markup(header: list[str], rows: list[list[str]]) -> str:
    """A table of plain texts as markup."""
    heads = "".join(f"<th>{_escaped(h)}</th>" for h in header)
    cells = "".join("<tr>" + "".join(f"<td>{_escaped(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f'<div class="table"><table><thead><tr>{heads}</tr></thead><tbody>{cells}</tbody></table></div>'


def figure_of(width: float, height: float, columns: int = 1) -> tuple["Figure", Any]:
    """An empty Matplotlib figure of so many inches, and its axes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "font.size": 10,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": INK,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
    }
    with rc_context({**style, "axes.spines.top": False, "axes.spines.right": False, "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots(1, columns)


def svg(figure: "Figure") -> str:
    """The figure as markup, the same bytes for the same figure."""
    from matplotlib import rc_context

    text = io.StringIO()
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": "rst_jax"}):
        _save(figure, text, format="svg", metadata={"Date": None}, transparent=True)
    body = text.getvalue()
    return body[body.index("<svg") :]


def pairs(clean: np.ndarray, adversarial: np.ndarray, said: list[list[str]], wrong: list[list[bool]]) -> str:
    """Images [n, H, W, C] above their adversarial ones, each under what it is taken for, red where that is wrong.

    `said` and `wrong` are two rows of n. Images that have neither one channel nor three are shown as the mean of these.
    """
    from matplotlib.figure import Figure

    n = len(clean)
    figure = Figure(figsize=(1.1 * n, 2.9), layout="constrained")
    grid = figure.subplots(2, n, squeeze=False)
    for row, images in enumerate((clean, adversarial)):
        for column, image in enumerate(images):
            axes, colour = grid[row, column], ROBUST if wrong[row][column] else INK
            seen = image if image.shape[-1] == 3 else image.mean(-1)
            axes.imshow(np.clip(seen, 0, 1), cmap="gray_r", vmin=0, vmax=1)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_title("\n".join(map(label, said[row][column].split("\n"))), fontsize=10, color=colour)
            for spine in axes.spines.values():
                spine.set_color(ROBUST if wrong[row][column] else "#dde2e6")
    if (channels := clean.shape[-1]) not in (1, 3):
        figure.supxlabel(f"the mean of {channels} channels", fontsize=8)
    picture = io.BytesIO()
    _save(figure, picture, format="png", dpi=150)
    data = base64.b64encode(picture.getvalue()).decode()
    return f'<img alt="clean and adversarial images" src="data:image/png;base64,{data}">'


def _save(figure: "Figure", file: Any, **options: Any) -> None:
    """`savefig`; a letter that the font has not is a box, without a word of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure.savefig(file, **options)
