"""Pages for a browser, without a network: headings, tables and figures. Text is escaped unless it is `Markup`."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

from markupsafe import Markup, escape

_STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1b1f24}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.3rem .8rem;border-bottom:1px solid #d0d7de;text-align:left}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}td.n{white-space:nowrap}td:first-child{min-width:8rem}.wide{overflow-x:auto}svg{max-width:100%;height:auto}
.small{color:#57606a;font-size:.85rem}"""


def page(title: str, body: Iterable[str]) -> str:
    """The HTML of a whole page."""
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{escape(title)}</title><style>{_STYLE}</style>" + "\n".join(map(escape, body)) + "</html>\n"
    )


def heading(text: str, level: int = 2) -> Markup:
    return Markup("<h{0}>{1}</h{0}>").format(level, text)


def note(text: str) -> Markup:
    """A paragraph in small type."""
    return Markup("<p class=small>{}</p>").format(text)


def name(text: str) -> Markup:
    """A long name without spaces, such as a task with its options, that may be broken between its parts."""
    return Markup(re.sub("[:,/]", r"\g<0><wbr>", str(escape(text))))


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

    def row(values: Sequence[str], tag: str) -> str:
        kinds = ("" if i < text else " class=n" for i in range(len(values)))
        return "<tr>" + "".join(f"<{tag}{k}>{escape(v)}</{tag}>" for k, v in zip(kinds, values, strict=True)) + "</tr>"

    top = f"<thead>{row(head, 'th')}</thead>" if head else ""
    return Markup(f"<div class=wide><table>{top}{''.join(row(r, 'td') for r in rows)}</table></div>")


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
