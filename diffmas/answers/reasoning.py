"""What a model thought aloud is not what it answered: texts without their reasoning blocks."""

from __future__ import annotations

import re

#: Opening and closing tags. A closing one alone ends a block that the prompt opened.
_BLOCKS = [
    *((f"<{name}>", f"</{name}>") for name in ("think", "thinking", "thought", "thoughts", "reasoning", "reflection")),
    (r"\[THINK\]", r"\[/THINK\]"),
    (r"<\|begin_of_thought\|>", r"<\|end_of_thought\|>"),
    (r"<\|START_THINKING\|>", r"<\|END_THINKING\|>"),
    ("◁think▷", "◁/think▷"),
]
#: Channels, with their marks and where the tokenizer left these out. What closes them closes other things too.
_CHANNELS = [
    (r"<\|channel\|>(?:analysis|commentary)\b[^<]{0,80}<\|message\|>", r"<\|end\|>(?:<\|start\|>assistant)?"),
    (r"\A\s*(?-i:analysis(?=[A-Z]))", r"(?-i:assistantfinal)"),
]
#: What opens or closes fenced code, in a list item too. Between backticks on one line stands no block.
FENCE = (
    r"[ \t]*(?P<marker>(?:[-*+]|[0-9]{1,3}[.)])[ \t]+)?(?P<fence>`{3,}(?=[^`\n]*(?:\n|\Z))|~{3,})"
    r"[ \t]*(?:\{[ \t]*\.?)?(?P<language>[\w+.-]*)"
)
_TAGS = [
    (
        re.compile(rf"{opening}|{closing}", re.IGNORECASE),
        # A fence stands at the beginning of a line or right behind a tag; three quotes open or close a string.
        re.compile(
            rf"(?P<opening>{opening})|(?P<closing>{closing})|(?<![^\n>\]▷]){FENCE}|(?P<string>\"{{3}}|'{{3}})",
            re.IGNORECASE,
        ),
        (opening, closing) in _BLOCKS,
    )
    for opening, closing in [*_BLOCKS, *_CHANNELS]
]
_OPENED = re.compile("|".join(rf"({opening})\s*$" for opening, _ in _BLOCKS), re.IGNORECASE)
_MARKS = re.compile(r"<\|channel\|>final\b[^<]{0,80}<\|message\|>|<\|return\|>(?![\"'`])")
_QUOTES = ('"', "'", "`")


def removed(text: str) -> str:
    """`text` without what stands inside `<think>…</think>` and its like; empty where such a block never ends.

    Fenced code is kept whole: its strings, comments and docstrings may hold such tags.
    """
    for tag, tags, alone in _TAGS:
        if tag.search(text):
            text = _without(text, tags, alone)
    return _MARKS.sub("", text)


def opened(prompt: str) -> str | None:
    """The tag that closes the reasoning block in which `prompt` ends; None where it ends in none."""
    found = _OPENED.search(prompt[-200:])
    return None if found is None else re.sub(r"\\(.)", r"\1", _BLOCKS[found.lastindex - 1][1])


def continued(prompt: str, text: str) -> str:
    """`text` behind the tag that `prompt` ends with, where its template opened a reasoning block."""
    found = _OPENED.search(prompt[-200:])
    return found[0] + text if found else text


def closes(fence: re.Match, opened: re.Match) -> bool:
    """Whether the line of `fence` ends the block that `opened` began."""
    return fence["fence"].startswith(opened["fence"]) and not (fence["language"] or fence["marker"])


def _without(text: str, tags: re.Pattern, alone: bool) -> str:
    kept, at, opened = [], 0, False
    fence, within, string = None, False, False
    for tag in tags.finditer(text):
        begin, end = tag.span()
        # In a program, a tag between quotes is a string.
        before, behind = text[max(0, begin - 1) : begin], re.match("```|.?", text[end : end + 3], re.S)[0]
        if opened:
            if tag["closing"]:
                at, opened = end, False
        elif tag["fence"]:
            if fence is None:
                fence, within, string = tag, False, False
            elif not string and closes(tag, fence):
                fence = None
        elif tag["string"]:
            string = not string
        elif tag["opening"]:
            if fence:
                within = True
            elif not (before in _QUOTES and _closes(text, end, before)):
                kept.append(text[at:begin])
                opened = True
        elif alone:
            if fence:
                # Reasoning that broke off in code ends with a tag that no line of code could hold.
                code, within = within or string or _in_line(text, begin), False
            else:
                code = behind in _QUOTES and _opens(text, begin, behind)
            if not code:
                kept, at, fence = [], end, None
    return "" if opened else "".join([*kept, text[at:]])


def _closes(text: str, end: int, quote: str) -> bool:
    """Whether the same line closes the quote that opened before a tag, not far behind it."""
    return quote in text[end : end + 60].partition("\n")[0]


def _opens(text: str, begin: int, quote: str) -> bool:
    """Whether a quote that closes behind a tag opened on the same line, not far before it."""
    return quote in text[max(0, begin - 60) : begin].rpartition("\n")[2]


def _in_line(text: str, begin: int) -> bool:
    """Whether a string or a comment has begun before a tag on its line of code."""
    return any(mark in text[max(0, begin - 200) : begin].rpartition("\n")[2] for mark in (*_QUOTES, "#"))
