r"""Mathematical answers: plain numbers are compared exactly, everything else by the package math-verify.

Which of the two depends on the right answer alone, never on what is installed: a right answer that is a plain number
or words needs no package; any other one needs math-verify, and :func:`require` says so before a model runs.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from diffmas.answers import expressions, final, numbers, reasoning
from diffmas.answers.verifier import Verifier

_STATED = re.compile(r"(?i)\banswer\b\**(?:\s+is\s*[:=]?|\s*[:=])\**\s*(?:equal\s+to\s+)?(?=[^\n])")
_END = re.compile(r"[.!?;](?:\s|$)|,?\s+(?:not|instead of|rather than|because|since)\b|,\s+as\b")
# What comments on a number before it: "72 clips (48 + 24)", but no "2 (x + 1)"; "72 = 48 + 24"; "72 clips: 48 and 24".
_REMARK = re.compile(
    r"\s+\((?=[^()]*(?:[^\W\d_]{2}|\b[ie]\.)|[^()A-Za-z]*\))"
    r"|\*\*\s|:\s|\s+—\s|\s+[–-]\s+(?=[^\W\d_]{2})|\s=\s(?=[-+*/×÷0-9.,$() ]+$)"
)
_PLACES = r"(?:decimal|significant|digit|place|figure|d\.?p|s\.?f)"
# What says more of it, with numbers of its own: "18 per 100 km", "72 clips, 24 of them in May"; but no list.
_MORE = re.compile(
    r"\s+(?:per|for|in|at|on|from|after|with|during|which|that|who|where|when|while|whereas|although|though)\b"
    rf"|\s+to\s+(?:the\s+nearest\b|(?=[0-9]+\s+{_PLACES}))"
    # Another clause, but not of another answer.
    r"|,?\s+and\s+(?:the|its|it|there|this|that|each|every)\b(?!\s+(?:other|second|next)\b)(?=.*\b(?:is|are|was|were|has|have)\b)"
    r"|(?<=[^\W\d_]),\s+(?=[0-9$])|,\s+(?!(?:and|or|but)\b)(?=[^\W\d_])"
)
# Where it only leads to the answer: "20 eggs in 5 boxes, so 4".
_LEADS = re.compile(r"=|\b(?:so|thus|hence|therefore|meaning|rounds)\b")
_SIGN = ("", r"\circ", "°")
# What an answer is not, up to where it says what it is.
_DENIED = re.compile(r"(?i)^(?:n['’]t|\W*not)\b(?:[^,;]|,(?=[0-9]{3}))*?(?:,(?![0-9]{3})|;|\bbut\b|$)(?:\s*but\b)?")
# These settle on nothing: "10 or 12", "between 10 and 12", "10 to 12"; but "3.14 to 2 decimal places" does.
_SEVERAL = re.compile(
    r"[0-9]\**\s+or\s+\**[$]?[0-9]|^\W*between\b"
    rf"|^\W*(?:(?:from|about|around|roughly|approximately|maybe)\s+)*[$]?{numbers.DIGITS}(?:\s+[^\W\d_]+)?\**"
    rf"(?:\s+(?:(?:up\s+)?to|through|till|until|and)\s+|\s*[–—]\s*)\**[$]?{numbers.DIGITS}"
    rf"(?!\s+{_PLACES})(?:[^0-9=/]|/(?![0-9]))*$"
)
# What has words in it, and not only LaTeX's.
_SENTENCE = re.compile(r"(?<![\\{A-Za-z])[^\W\d_]{2,}\s")
# Where a question asks for dozens or millions, the word behind the number is a unit.
_ASKED = re.compile(rf"(?i)\b(?:how many|how much|in)(?: more| total)? ({'|'.join(numbers.SCALES)})s?\b")
# Not "$5 and $6".
_MATHS = re.compile(
    r"\$\$?(?!\s)([^$\n]+)(?<!\s)\$\$?(?!\d)|\$\$?\s+([^$\n]+?)\s+\$\$?(?!\d)|\\\((.+?)\\\)|\\\[(.+?)\\\]"
)
_WORDS = re.compile(r"[^\W\d_]+[.!]?|(?=.*[^\W\d_]{3})[^\W\d_]+(?:(?:\s+|['-])[^\W\d_]+)*[.!]?")
# Times, ratios and dates are no sums: 12:30 is not 12/30.
_TIME = re.compile(r"[0-9]+(?::[0-9]+)+(?:\s*[AaPp]\.?[Mm]\.?)?|[0-9]+([-/.])[0-9]+\1[0-9]+")
_SIMPLER = (
    (re.compile(r"\\(?:left|right|displaystyle|limits)(?![a-zA-Z])"), ""),
    (re.compile(r"\\[dt]frac"), r"\\frac"),
    (re.compile(r"\\(?:text|mathrm|textbf|mbox)\s*\{\s*([^{}]*?)\s*\}"), r"\1"),
    (re.compile(r"\\[,;!: ]|\\quad|~|(?<!\d)\s+|\s+(?!\d)"), ""),
    (re.compile(r"\^\{?\\circ\}?|\\%|%|\\\$|\$"), ""),
)
_verifier = Verifier()


def extract(text: str) -> str | None:
    """The final answer in a normal form: in the last `\\boxed{}`, behind `####`, stated, or else the last number."""
    found = _final(text)
    return None if found is None else normal(found)


def check(text: str, item: Mapping[str, Any]) -> bool:
    """Whether the final answer of `text` equals the item's `gold` (or `answer`) mathematically."""
    gold, text = str(item.get("gold", item["answer"])), reasoning.removed(text)
    found = _final(text)
    if found and (asked := _ASKED.search(str(item.get("question", "")))):
        found = re.sub(rf"(?i)\b{asked[1]}s?\b", "", found)
    if numbers.parse(gold) is None and _repeats(text, gold):
        return True
    if found is None:
        return False
    if normal(found) == normal(gold):
        return True
    if not needs_verifier(gold):
        # x = 5 answers "what is x?"; an exact number is not equal to an expression nobody has worked out.
        value, right = numbers.parse(found.rpartition("=")[2]), numbers.parse(gold)
        return value is not None and value == right
    return len(found) <= numbers.LONGEST and _verifier(gold, found)


def _repeats(text: str, gold: str) -> bool:
    """Whether a text, or the final answer in it, is written like a right answer that is no number, as in "12:30"."""
    said = (text, final.words(text) or "")
    return any(s.strip() and len(s) <= numbers.LONGEST and normal(s) == normal(gold) for s in said)


def normal(answer: str) -> str:
    """A number as :func:`numbers.normal`; anything else without spacing, dollars and the looser LaTeX, lower case."""
    answer = final.unwrapped(answer)
    if (value := numbers.parse(answer)) is not None:
        return numbers.normal(value)
    for pattern, replacement in _SIMPLER:
        answer = pattern.sub(replacement, answer)
    return answer.strip().rstrip(".").casefold()


def needs_verifier(gold: str) -> bool:
    """Whether an exact comparison cannot decide on predictions for this right answer."""
    gold = final.unwrapped(gold)
    return numbers.parse(gold) is None and not (_WORDS.fullmatch(gold) or _TIME.fullmatch(gold))


def require(golds: Iterable[str], task: str) -> None:
    """Raise `ModuleNotFoundError` where a right answer needs math-verify and it is not installed."""
    if importlib.util.find_spec("math_verify") is None and (needing := next(filter(needs_verifier, golds), None)):
        raise ModuleNotFoundError(
            f"task {task} compares answers such as {needing!r} with the package math-verify, which is not installed; "
            "install diffmas[data]"
        )


def _final(text: str) -> str | None:
    text = numbers.plain(reasoning.removed(text))
    if (found := final.marked(text)) is not None:
        # "<answer>The answer is 12</answer>"
        return _stated(found) if _STATED.search(found) else numbers.joined(found)
    _, mark, tail = text.rpartition("####")
    if mark:
        line = numbers.joined(tail.strip().partition("\n")[0].strip())
        head = next((head for head in (line, *_heads(line)) if numbers.parse(head) is not None), None)
        if head is None and _STATED.search(line):
            return _stated(line)
        return head or (_said(line) if _SENTENCE.search(line) else line) or None
    return _stated(text) if _STATED.search(text) else numbers.last(text)


def _stated(text: str) -> str | None:
    """What the last statement of an answer in `text` says."""
    *_, stated = _STATED.finditer(text)
    return _said(final.line(text[stated.end() :]))


def _said(line: str) -> str | None:
    """The answer that a line of running text begins with, or else ends on; None where it says what it is not."""
    sentence = _END.split(line, maxsplit=1)[0]
    if denied := _DENIED.match(sentence):
        sentence = sentence[denied.end() :]
        if not sentence.strip(" *."):
            return None
    if _SEVERAL.search(sentence):
        return sentence.strip(" *.")
    sentence = numbers.joined(sentence.strip(" *"))
    for head in (sentence, *_heads(sentence)):
        if numbers.parse(head) is not None:
            return head
    # A degree sign alone is none.
    if maths := [part for parts in _MATHS.findall(sentence) for part in parts if part.strip("^{} ") not in _SIGN]:
        return maths[-1]
    return expressions.leading(sentence) or numbers.last(sentence) or sentence.strip(" *.")


def _heads(sentence: str) -> Iterator[str]:
    """What stands before each remark."""
    sentence = sentence[: numbers.LONGEST]
    for remark in _REMARK.finditer(sentence):
        yield numbers.joined(sentence[: remark.start()].strip(" *"))
    for remark in _MORE.finditer(sentence):
        if not _LEADS.search(sentence, remark.start()):
            yield numbers.joined(sentence[: remark.start()].rpartition("=")[2].strip(" *"))
