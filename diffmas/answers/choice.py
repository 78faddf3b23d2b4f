"""Multiple choice: the letter a text settles on, or the option it repeats."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from diffmas.answers import final, reasoning

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_OPEN = r"[\s$*_\"'`(\[]{0,9}(?:\\(?:text|textbf|mathrm|mathbf|boxed)\s*\{)?[\s*(\[]{0,9}"
_CLOSE = r"(?=[)\]}*_\"'`$.,:;!?\s]|$)"
_LETTER = rf"{_OPEN}(?P<letter>[A-Za-j]){_CLOSE}"
_STATED = [
    # "the correct answer is (B)", "Answer: B", "option: C", "my choice would be D"
    re.compile(
        rf"(?i:\b(?:answer|choice|option|letter)\b\**(?:\s+(?:here|then|thus|therefore))?"
        rf"(?:\s*[:=]|\s+(?:is|would\s+be|should\s+be|must\s+be|will\s+be))(?:\s*[:=])?"
        rf"(?:\s+(?:clearly|therefore|thus|definitely|probably|likely))?(?:\s+(?:option|choice|letter))?)\s*{_LETTER}"
    ),
    # "option B is correct", "(C) is the right answer"
    re.compile(
        r"(?<![\w'])(?:(?i:option|choice|answer)\s+)?[(\[*]{0,5}(?P<letter>[A-Z])[)\]*]{0,5}"
        r"\s+(?i:is\s+(?:clearly\s+)?(?:the\s+)?(?:only\s+)?(?:best\s+|most\s+)?(?:correct|right|answer|best))\b"
    ),
    # "I choose D", "go with (A)", "so it is B"
    re.compile(
        rf"(?i:\b(?:choose|chose|pick|select|go(?:ing)?\s+with|settle\s+on|opt\s+for|it\s+is|it's|must\s+be)"
        rf"(?:\s+(?:option|choice|answer|letter))?)\s*{_LETTER}"
    ),
]
# "a", "A" and "I" may be words where they are no answer: "the answer is a mixture".
_GOES_ON = re.compile(
    r"[)\]}*_\"'`$]*(?:\s*$|\s*[.,:;!?)]|\s*\n|\s+(?:because|since|as|for|due|which|so|and\s+not|not|rather)\b|\s+[—–(-])"
)
_SEVERAL = re.compile(
    r"[)\]}*_\"'`$]*\s*(?:,|/|&|\bor\b|\band\b)\s*(?:\b(?:or|and|maybe)\b\s*)?[(\[*$]*(?!I['’]|I\s+[a-z])[A-Z]\b[)\]*$.]*(?!\w)"
)
_NEGATED = re.compile(r"(?i)(?:\bnot|n't|\bnever|\bneither|\bwrong|\bincorrect|\beliminate[sd]?)\W*(?:\w+\W+){0,2}$")
_ALONE = re.compile(r"[\s$*_#\"'`>(\[-]*(?:\\text\s*\{)?(?P<letter>[A-Za-j])[)\]}*_\"'`$.:!\s]*")
_LISTED = re.compile(r"[\s*_\"'`>-]*[(\[]?(?P<letter>[A-Z])(?:[)\]:]|\.(?!\w))[)\]*]*\s*(?P<text>\S.*)")


def extract(text: str) -> str | None:
    """The letter `text` settles on, upper case; a boxed answer that is no letter in lower case; None without one."""
    letter, words = _settled(text)
    return letter or (_plain(words) or None if words else None)


def check(text: str, item: Mapping[str, Any]) -> bool:
    """Whether `text` settles on the letter `item["gold"]`, or repeats that one of the options `item["options"]`."""
    letter, words = _settled(text)
    if letter is None and words is None:
        lines = [line for line in reasoning.removed(text).strip().splitlines() if line.strip()]
        words = lines[-1] if lines else None
    if words is not None and (named := _option(words, item.get("options") or ())):
        # "A) Rome", where Rome is option B, settles on nothing.
        letter = named if letter in (None, named) else None
    return letter == item["gold"]


def _option(words: str, options: Sequence[str]) -> str | None:
    wanted, plain = _plain(words), [_plain(option) for option in options]
    named = [LETTERS[i] for i, option in enumerate(plain) if option and option == wanted]
    return named[0] if len(named) == 1 else None


def _settled(text: str) -> tuple[str | None, str | None]:
    """The letter and the words of the final answer, either of which can be missing."""
    text = unicodedata.normalize("NFKC", reasoning.removed(text))
    if (boxed := final.marked(text)) is not None:
        return _labelled(final.unwrapped(boxed))
    for pattern in _STATED:
        for match in reversed(list(pattern.finditer(text))):
            if _NEGATED.search(re.split(r"[.,;:\n]", text[max(0, match.start() - 60) : match.start()])[-1]):
                continue
            rest = text[match.end("letter") :]
            if _SEVERAL.match(rest):
                return None, ""
            if match["letter"] in "aAI" and pattern is not _STATED[1] and not _GOES_ON.match(rest):
                continue
            if match["letter"].islower() and not _GOES_ON.match(rest):
                continue
            return match["letter"].upper(), None
    stated = re.findall(r"(?i)\banswer(?:\s+is|\s*:)\s*:?\s*([^\n]+)", text)
    if stated:
        return None, stated[-1].strip(" *_.\"'")
    lines = [line for line in text.strip().splitlines() if line.strip()]
    if not lines:
        return None, None
    if alone := _ALONE.fullmatch(lines[-1]):
        return alone["letter"].upper(), None
    listed = [m for line in lines if (m := _LISTED.fullmatch(line))]
    # Options repeated from the question are no answer.
    if len({m["letter"] for m in listed}) == 1 and listed[-1].string in (lines[0], lines[-1]):
        return listed[-1]["letter"], listed[-1]["text"]
    return None, None


def _labelled(answer: str) -> tuple[str | None, str | None]:
    """Letter and words of "B", "(b)", "B) Rome", "B. Rome", "option B"; words alone of anything else."""
    answer = re.sub(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1", answer).strip(" $*")
    answer = re.sub(r"(?i)^(?:option|choice|answer)\s*:?\s+(?=\W?[a-j]\b)", "", answer)
    if alone := _ALONE.fullmatch(answer):
        return alone["letter"].upper(), None
    if listed := _LISTED.fullmatch(answer):
        return listed["letter"], listed["text"]
    return None, answer


def _plain(text: str) -> str:
    """Lower case, without LaTeX, punctuation around words, articles and doubled spaces."""
    text = re.sub(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\[,;!: ]|[\"'`*_$]", "", text).casefold().strip(" .:;,!?()[]")
    text = re.sub(r"\s+", " ", text)
    return re.sub(r"^(?:a|an|the) (?=\S)", "", text)
