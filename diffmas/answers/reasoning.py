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
_TAGS = [
    (re.compile(rf"(?P<opening>{opening})|{closing}", re.IGNORECASE), (opening, closing) in _BLOCKS)
    for opening, closing in [*_BLOCKS, *_CHANNELS]
]
_OPENED = re.compile(rf"(?:{'|'.join(opening for opening, _ in _BLOCKS)})\s*$", re.IGNORECASE)
_MARKS = re.compile(r"<\|channel\|>final\b[^<]{0,80}<\|message\|>|<\|return\|>")
_QUOTES = ('"', "'", "`")


def removed(text: str) -> str:
    """`text` without what stands inside `<think>…</think>` and its like; empty where such a block never ends."""
    for tags, alone in _TAGS:
        text = _without(text, tags, alone)
    return _MARKS.sub("", text)


def continued(prompt: str, text: str) -> str:
    """`text` behind the tag that `prompt` ends with, where its template opened a reasoning block."""
    opened = _OPENED.search(prompt[-200:])
    return opened[0] + text if opened else text


def _without(text: str, tags: re.Pattern, alone: bool) -> str:
    kept, at, opened = [], 0, False
    for tag in tags.finditer(text):
        begin, end = tag.span()
        # In a program, a tag between quotes is a string.
        before, behind = text[max(0, begin - 1) : begin] or " ", re.match("```|.?", text[end : end + 3], re.S)[0]
        if tag["opening"]:
            if not opened and not (before in _QUOTES and _closes(text, end, before)):
                kept.append(text[at:begin])
                opened = True
        elif opened:
            at, opened = end, False
        elif alone and not (behind in _QUOTES and _opens(text, begin, behind)):
            kept, at = [], end
    return "" if opened else "".join([*kept, text[at:]])


def _closes(text: str, end: int, quote: str) -> bool:
    """Whether the same line closes the quote that opened before a tag, not far behind it."""
    return quote in text[end : end + 60].partition("\n")[0]


def _opens(text: str, begin: int, quote: str) -> bool:
    """Whether a quote that closes behind a tag opened on the same line, not far before it."""
    return quote in text[max(0, begin - 60) : begin].rpartition("\n")[2]
