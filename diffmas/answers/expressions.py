"""Where a formula that running text begins with ends: "2x + 5 for all x" begins with "2x + 5"."""

from __future__ import annotations

import re

from diffmas.answers import numbers

#: Longer ones are no answers.
LONGEST = 1000
_NAMES = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|sec|csc|cot|log|ln|exp|sqrt|pi|theta|infinity|infty|oo"
_TOKEN = re.compile(
    rf"\s*(?:(?P<command>\\[A-Za-z]+|\\[{{}}|])|(?P<number>{numbers.DIGITS})|(?P<operator>\*\*|[-+*/^_=<>!|·×÷±−≤≥≠∪∩])"
    rf"|(?P<opening>[(\[{{])|(?P<closing>[)\]}}])|(?P<comma>,)"
    rf"|(?P<name>(?:{_NAMES})(?![A-Za-z])|[π∞√°]|[a-zA-Z]{{1,3}}(?![A-Za-z])))"
)
_OPERATOR = re.compile(r"\s*[-+*/^_=<>)\]}(]")
_PRODUCT = re.compile("[abcnpqxyz]+")
_KNOWN = re.compile(rf"(?:{_NAMES}|[π∞√°]|[a-zA-Z])$")


def leading(text: str) -> str | None:
    """The formula at the start of `text`; None where there is none, or a number that a better one may follow.

    Letters are variables where they stand alone or run into a product ("2xy + 1"); a comma outside of brackets belongs
    to a formula that is all of the text. "20 + 5, so 25" and "x + 3 = 8, so x = 5" go on to something better: None.
    """
    text = text.strip().rstrip(".").strip()[:LONGEST]
    tokens = _tokens(text)
    end, whole = _end(tokens, commas=True), len(text)
    if end != whole:
        end = _end(tokens, commas=False)
    found, rest = text[:end].strip(), text[end:]
    if not found or not _is_formula(tokens, end):
        return None
    is_open = "=" in found or numbers.parse(found) is not None or not re.search(r"[A-Za-zπ√∞\\]", found)
    if is_open and re.search("[0-9]", rest):
        return None
    behind = found.rpartition("=")[2].strip()
    return behind if behind != found and numbers.parse(behind) is not None else found


def _tokens(text: str) -> list[tuple[str, int, int]]:
    """Kind, start and end of what could be of one formula, from the start of `text`."""
    tokens, at = [], 0
    while match := _TOKEN.match(text, at):
        kind, begin = match.lastgroup, match.start(match.lastgroup)
        if kind == "name" and not _continues(match, text, tokens):
            break
        if kind in ("number", "command", "opening") and begin > at and tokens and tokens[-1][0] in ("number", "name"):
            break
        tokens.append((kind, begin, match.end()))
        at = match.end()
    return tokens


def _continues(match: re.Match, text: str, tokens: list[tuple[str, int, int]]) -> bool:
    """Whether letters go on with a formula: "5 a day" and "5 cm" have a word behind the number, "2 x + 1" has not."""
    before = tokens[-1] if tokens else ("", 0, -1)
    operator, last = _OPERATOR.match(text, match.end()) is not None, match.end() == len(text)
    if _KNOWN.match(match["name"]):
        attached = match.start("name") == match.start() or before[0] not in ("number", "name", "closing")
        return attached or operator or last
    return match.start("name") == before[2] and (operator or (last and _PRODUCT.fullmatch(match["name"]) is not None))


def _end(tokens: list[tuple[str, int, int]], *, commas: bool) -> int:
    """Where the longest formula of these tokens ends: brackets closed, nothing missing behind the last operator."""
    depth, end = 0, 0
    for kind, _, after in tokens:
        depth += (kind == "opening") - (kind == "closing")
        if depth < 0 or (kind == "comma" and depth == 0 and not commas):
            break
        if depth == 0 and kind not in ("operator", "comma"):
            end = after
    return end


def _is_formula(tokens: list[tuple[str, int, int]], end: int) -> bool:
    kinds = [kind for kind, _, after in tokens if after <= end]
    # Of a lone letter nothing says that it is no word; a number and a letter are a product.
    return bool({"operator", "command", "comma", "opening"} & set(kinds)) or len(kinds) > 1
