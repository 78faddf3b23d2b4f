"""Where a worked text says its final answer."""

from __future__ import annotations

import re

_BOXED = re.compile(r"\\(?:boxed|fbox)\s*(?:(?P<brace>\{)|(?P<bare>[^\s{}$\\]+))")
_WRAPPED = re.compile(
    r"\\(?:text|textbf|textit|textrm|textsf|mathrm|mathbf|mathsf|mathit|boldsymbol|mbox|bf)\s*\{(.*)\}", re.DOTALL
)


def boxed(text: str) -> str | None:
    """What the last complete `\\boxed{…}` holds; None where there is none."""
    matches = {match.end(): match for match in _BOXED.finditer(text)}
    if not matches:
        return None
    closed = _closing(text)
    for end, match in reversed(matches.items()):
        if match["bare"]:
            return match["bare"].rstrip(".,;")
        if end - 1 in closed:
            return text[end : closed[end - 1]].strip()
    return None


def _closing(text: str) -> dict[int, int]:
    """Where each brace that is closed is closed; in one pass, since models can repeat themselves for long."""
    closed, waiting, i = {}, [], 0
    while i < len(text):
        if text[i] == "\\":
            i += 1
        elif text[i] == "{":
            waiting.append(i)
        elif text[i] == "}" and waiting:
            closed[waiting.pop()] = i
        i += 1
    return closed


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
