"""Pages for a browser, without a network: headings, tables and figures. Text is escaped unless it is `Markup`."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
    keep_trailing_newline=True, trim_blocks=True,
)  # fmt: skip
_PARTS: Any = _TEMPLATES.get_template("parts.html").module


def page(title: str, body: Iterable[str]) -> str:
    """The HTML of a whole page."""
    return _TEMPLATES.get_template("page.html").render(title=title, body=body)


def heading(text: str, level: int = 2) -> Markup:
    return _PARTS.heading(text, level)


def note(text: str) -> Markup:
    """A paragraph in small type."""
    return _PARTS.note(text)


def listing(text: str) -> Markup:
    """Text whose lines stay as they are."""
    return _PARTS.listing(text)


def name(text: str) -> Markup:
    """A long name without spaces, such as a task with its options, that may be broken between its parts."""
    return Markup("<wbr>").join(re.split("(?<=[:,/])", text))


def panels(plt, count: int, width: float, height: float):
    """A figure of `count` panels of that size in inches, three in a row; returns it and the panels."""
    columns = min(count, 3)
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(1.5 + width * columns, height * rows), sharey=True, squeeze=False, layout="constrained"
    )
    for unused in axes.flat[count:]:
        unused.set_axis_off()
    return figure, axes.flat[:count]


def table(head: Sequence[str], rows: Iterable[Sequence[str]], text: int = 1) -> Markup:
    """The first `text` columns are aligned to the left, numbers to the right; no header where `head` is empty."""
    return _PARTS.table(head, rows, text)


def svg(draw, data) -> Markup:
    """The figure `draw(plt, data)` as SVG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # A fixed salt and no date: the same run gives the same file. Dollars in a name are no mathematics.
    settings: dict[Any, Any] = {
        "svg.hashsalt": "diffmas", "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False,
    }  # fmt: skip
    with plt.rc_context(settings):
        figure = draw(plt, data)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
        plt.close(figure)
    text = buffer.getvalue()
    return Markup(text[text.index("<svg") :])
