"""Parts of a page: text is escaped wherever it stands, and is no template; markup stays."""

import re

import pytest
from markupsafe import Markup

from diffmas.support import page

TEXT = "<b>&\"' {{ title }} {% if %}"
ESCAPED = "&lt;b&gt;&amp;&#34;&#39; {{ title }} {% if %}"


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (page.heading(TEXT), f"<h2>{ESCAPED}</h2>"),
        (page.heading(TEXT, 1), f"<h1>{ESCAPED}</h1>"),
        (page.note(TEXT), f"<p class=small>{ESCAPED}</p>"),
        (page.listing(f"{TEXT}\n 1"), f"<pre class=small>{ESCAPED}\n 1</pre>"),
        (page.name("a:<b>,c/d&"), "a:<wbr>&lt;b&gt;,<wbr>c/<wbr>d&amp;"),
    ],
)
def test_a_part(part, expected):
    assert isinstance(part, Markup) and part == expected


def test_a_table():
    rows = [["x", TEXT], [Markup("<i>y</i>"), "2"]]
    body = f"<tr><td>x</td><td class=n>{ESCAPED}</td></tr><tr><td><i>y</i></td><td class=n>2</td></tr>"
    head = "<thead><tr><th></th><th class=n>&lt;n&gt;</th></tr></thead>"
    assert page.table(["", "<n>"], iter(rows)) == f"<div class=wide><table>{head}{body}</table></div>"
    assert page.table([], rows, text=2) == f"<div class=wide><table>{body.replace(' class=n', '')}</table></div>"


def test_a_page():
    found = page.page(TEXT, iter([page.heading("one"), TEXT]))
    assert f"<title>{ESCAPED}</title>" in found and f"<h2>one</h2>\n{ESCAPED}\n</html>\n" in found
    assert not set(re.findall("<([a-z0-9]+)", found)) - {"html", "meta", "title", "style", "h2"}
