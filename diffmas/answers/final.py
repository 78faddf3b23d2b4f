"""Where a worked text says its final answer."""

from __future__ import annotations

import re

_BOXED = re.compile(r"\\(?:boxed|fbox)\s*(?:(?P<brace>\{)|(?P<bare>[^\s{}$\\]+))")
_WRAPPED = re.compile(
    r"\\(?:text|textbf|textit|textrm|textsf|mathrm|mathbf|mathsf|mathit|boldsymbol|mbox|bf)\s*\{(.*)\}", re.DOTALL
)
# "(put the final answer inside \boxed{})"
_BLANK = re.compile(
    r"(?:[\s._…~]|\\[,;!: ]|\\(?:[lc]?dots|q?quad)(?![a-z])|\{\})*"
    r"|(?:\\text\s*\{\s*)?(?i:(?:your |the )?(?:final )?answer)\s*\}?"
)

_TAGGED = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL | re.IGNORECASE)
_STATED = re.compile(
    r"(?i)\b(?:answer|result|conclusion)\b[*_]{0,3}(?:\s+(?:is|was|would be|must be|should be)\b(?:\s*:)?|\s*[:=])"
    r"[*_]{0,3}\s*(?=[^\n])"
)
_NEGATED = re.compile(
    r"(?i)(?:\b(?:not|never|no|neither|nor|cannot|if|whether|wrong|incorrect|false|unlikely|common|possible|doubt\w*|guess\w*)\b|n['’]t\b)"
)
_VERDICT = re.compile(
    r"(?im)(?:^|(?<=[.!?]\s))[*_\"']{0,3}(yes|no|true|false)\b[*_\"']{0,3}(?:[,.;:!]|\s*$|\s+[—–-]\s)"
)
_BOLD = re.compile(r"(?i)(?:\b(?:is|are|was|were|be)\b|[:=])\s*\*\*(?P<answer>[^*\n]+)\*\*[.!]?$")
#: Abbreviations whose full stop ends no sentence.
_SHORTENED = (
    "Dr", "Mr", "Ms", "St", "Jr", "Sr", "Mt", "Ft", "Mrs", "Vol", "Gen", "Col", "Sgt", "Rev", "Inc", "Ltd", "Prof",
    "Capt",
)  # fmt: skip
#: Those that are so before a number only: "No. 5", "Jan. 5".
_NUMBERED = ("No", "Jan", "Feb", "Mar", "Apr", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec", "Sept")
# A full stop within a sentence: an abbreviation's, or one with no space behind ("2.5", "a.m", "v1.2"). The reasons
# stand in a lookahead, and what may be in a sentence excludes each other, so that no text is tried in several ways.
_STOP = (
    r"(?=\.(?:(?=\w)|(?<=[A-Z]\.)|(?<=\b[a-z]\.[a-z]\.)(?=\s+[a-z0-9])"
    + "".join(rf"|(?<=\b{word}\.)" for word in _SHORTENED)
    + "".join(rf"|(?<=\b{word}\.)(?=\s+[0-9])" for word in _NUMBERED)
    + r"))\."
)
_WITHIN = rf"(?:[^.!?:]|:(?=[\w/])|{_STOP})"
_IS = re.compile(
    rf"^(?:(?:[^.!?]|{_STOP}){{0,200}}?[.!]\s+)?{_WITHIN}{{0,200}}?\b(?i:is|are|was|were)(?:\s*:)?\s+"
    rf"(?P<answer>{_WITHIN}{{1,100}}?)[.!]?$"
)
# What ends a stated answer: a sentence, or a remark on it.
_BEHIND = re.compile(
    rf"(?!{_STOP})[.!?;](?:\s+|$)"
    r"|,?\s+(?:because|since|instead of|rather than)\b"
    r"|,\s+(?:not|as|so|which|who)\b|\s+\((?=[^()]*[^\W\d_]{2})[^()]*\)[.!]?$|\s+[—–]\s"
)
# A second look at an answer that has been given: "This answer is correct."
_REMARK = re.compile(
    r"(?i)[*_]{0,3}(?:correct|right|final|wrong|incorrect|consistent|confirmed|verified|unique|reasonable)\b"
)
_DISPLAY = re.compile(r"(?:\\\[|\$\$).{1,1000}?(?:\\\]|\$\$)", re.DOTALL)
_OPENING = re.compile(r"(?i)^(?:clear|simple|obvious|as follows|the following)\s*:\s*")


def boxed(text: str) -> str | None:
    """What the last complete `\\boxed{…}` holds that is not left blank; None where there is none."""
    matches = {match.end(): match for match in _BOXED.finditer(text)}
    if not matches:
        return None
    closed = _closing(text)
    for end, match in reversed(matches.items()):
        found = match["bare"].rstrip(".,;") if match["bare"] else text[end : closed.get(end - 1, end)].strip()
        if not _BLANK.fullmatch(found):
            return found
    return None


def marked(text: str) -> str | None:
    """What is :func:`boxed`, or else what the last `<answer>…</answer>` holds; None where there is neither."""
    if (found := boxed(text)) is None and (tagged := _TAGGED.findall(text)):
        return tagged[-1].strip()
    return found


def words(text: str) -> str | None:
    """The final answer of a text whose answer may be any words; None where there is none.

    Boxed, between `<answer>` tags, behind `####`, stated ("the answer is …", "Answer: …"), a yes or no that the text
    begins with, or what the last line says or puts in bold behind "is".
    """
    if (found := marked(text)) is not None:
        return unwrapped(found) or None
    _, mark, tail = text.rpartition("####")
    if mark:
        return tail.strip().partition("\n")[0].strip() or None
    if (stated := _stated(text)) is not None:
        return _sentence(stated)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return None
    verdicts = {m[1].casefold() for m in _VERDICT.finditer(text)}
    if (first := _VERDICT.match(text.strip())) and (len(lines) == 1 or len(lines[-1].split()) > 5):
        return first[1] if len(verdicts) == 1 else None
    last = re.sub(r"^(?:[-*+>]|#{1,6})\s+", "", lines[-1])
    said = _BOLD.search(last) or _IS.search(last)
    if said and not _NEGATED.search(last[: said.start("answer")]):
        return _sentence(said["answer"])
    return last


def written(text: str) -> list[str]:
    """The final answer as :func:`words` finds it, with every character of it.

    First all that is marked or stated. Behind it, as the answer alone, the box's without its `\\text{…}`, the first
    line, or the statement's without bold type around the whole and what ends it.
    """
    if (found := boxed(text)) is not None:
        return [found, _without_command(found)]
    if (found := marked(text)) is not None:
        return [found]
    _, mark, tail = text.rpartition("####")
    last = [tail.strip()] if mark else [stated] if (stated := _stated(text)) is not None else []
    return [*last, *filter(None, [words(text)])]


def line(text: str) -> str:
    """The first line of a text; a display that it begins with is one line, however many it is written on."""
    display = _DISPLAY.match(text)
    end = display.end() if display else 0
    return " ".join(text[:end].split()) + text[end:].partition("\n")[0]


def _stated(text: str) -> str | None:
    """The line behind the last statement of an answer, or behind the one that later ones only comment on."""
    stated = [m for m in _STATED.finditer(text) if not _NEGATED.search(_clause(text, m.start()))]
    if not stated:
        return None
    meant = next((m for m in reversed(stated) if not _REMARK.match(text, m.end())), stated[-1])
    found = line(text[meant.end() :]).strip()
    # "**Answer: Paris**" opens its bold type before.
    return found.removesuffix("**").strip() if found.count("**") % 2 else found


def _clause(text: str, end: int) -> str:
    """What stands before `end` in the same sentence."""
    return re.split(r"[.!?;\n]|,\s+(?:so|thus|hence|therefore)\b", text[max(0, end - 80) : end])[-1]


def _sentence(text: str) -> str | None:
    """The first sentence of a stated answer, without bold type and remarks: "**Paris**, because …" is Paris.

    None where it asks, or says nothing.
    """
    text = _OPENING.sub("", text.strip())
    if re.match(r"[^.!?\n]*\?", text):
        return None
    if bold := re.match(r"\*\*([^*\n]+)\*\*", text):
        return bold[1].strip() or None
    return _BEHIND.split(text, maxsplit=1)[0].strip() or None


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
        answer = _without_command(answer)
        if answer == before:
            return answer


def _without_command(answer: str) -> str:
    wrapped = _WRAPPED.fullmatch(answer)
    return wrapped[1] if wrapped and _balanced(wrapped[1]) else answer


def _balanced(text: str) -> bool:
    depth = 0
    for c in text:
        depth += {"{": 1, "}": -1}.get(c, 0)
        if depth < 0:
            return False
    return depth == 0
