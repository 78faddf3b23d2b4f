"""Where a worked text says its final answer."""

from __future__ import annotations

import re

_BOXED = re.compile(r"\\f?boxed\s*(?:(?P<brace>\{)|(?P<bare>[^\s{}$\\]+))")
_WRAPPED = re.compile(
    r"\\(?:text|textbf|textit|textrm|textsf|mathrm|mathbf|mathsf|mathit|boldsymbol|mbox|bf)\s*\{(.*)\}", re.DOTALL
)


def boxed(text: str) -> str | None:
    """What the last complete `\\boxed{…}` holds; None where there is none."""
    for match in reversed(list(_BOXED.finditer(text))):
        if match["bare"]:
            return match["bare"].rstrip(".,;")
        depth = 1
        for i in range(match.end(), len(text)):
            if text[i] in "{}" and not _escaped(text, i):
                depth += 1 if text[i] == "{" else -1
            if depth == 0:
                return text[match.end() : i].strip()
    return None


def _escaped(text: str, i: int) -> bool:
    return (i - len(text[:i].rstrip("\\"))) % 2 == 1


def unwrapped(answer: str) -> str:
    """Without the dollars, bold type and `\\text{…}` around the whole of it."""
    while True:
        before, answer = answer, answer.strip().strip("$*").strip()
        for opening, closing in ((r"\(", r"\)"), (r"\[", r"\]")):
            if answer.startswith(opening) and answer.endswith(closing):
                answer = answer[2:-2]
        if (wrapped := _WRAPPED.fullmatch(answer)) and _balanced(wrapped[1]):
            answer = wrapped[1]
        if answer == before:
            return answer


def _balanced(text: str) -> bool:
    depth = 0
    for c in text:
        depth += {"{": 1, "}": -1}.get(c, 0)
        if depth < 0:
            return False
    return depth == 0
