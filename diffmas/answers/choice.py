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
        rf"(?i:\b(?:answer|choice|option|letter)\b[*_\"']*(?:\s+(?:here|then|thus|therefore))?"
        rf"(?:\s*[:=]|\s+(?:is|would\s+be|should\s+be|must\s+be|will\s+be))(?:\s*[:=])?"
        rf"(?:\s+(?:clearly|therefore|thus|definitely|probably|likely))?(?:\s+(?:option|choice|letter))?)\s*{_LETTER}"
    ),
    # "option B is correct", "(C) is the right answer"; not "Vitamin C is correct" (see _ENDS_A_NAME)
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
_REASONED = re.compile(
    rf"(?m:^)(?:(?i:option|choice|answer)\s+)?{_LETTER}[)\]*_\"'`$]*,?[ \t]+(?i:because|since|due\s+to)\b"
)
# "a", "A" and "I" may be words where they are no answer: "the answer is a mixture".
_GOES_ON = re.compile(
    r"[)\]}*_\"'`$]*(?:\s*$|\s*[.,:;!?)]|\s*\n|\s+(?:because|since|as|for|due|which|so|and\s+not|not|rather)\b|\s+[—–(-])"
)
_SEVERAL = re.compile(
    r"[)\]}*_\"'`$]{0,9}(?:\s*(?:[,;/&+]|\bor\b|\band\b)\s*(?:\b(?:or|and|maybe)\b\s*)?[(\[*$]*(?!I['’]|I\s+[a-z])[A-Z]\b"
    r"(?!\s+(?:is|was|has|does|would|can|cannot|fails)\b)[)\]*$.]*(?!\w)"
    # "(A)(B)", "A B"
    r"|[ \t]*(?:[(\[]+[A-Z][)\]]|(?<=[\s)\]*])[*$]{0,3}[A-Z][*$.]*[ \t]*(?:\n|\Z)))"
)
_SEVERAL_BEFORE = re.compile(r"\b[A-Z][)\]*]*\s*(?:/|&|\bor\b|\band\b|\bnor\b)\s*[(\[*]*\Z")
# What denies, or only supposes, what comes up to four words later in the same clause.
_CLAUSE = re.compile(r"(?i)[.,;:!?\n]|\b(?:and|but|so|then|thus|hence|therefore|because|since|while|whereas)\b")
_NEGATED = re.compile(
    r"(?i)(?:\bnot|n['’]t|\bnever|\bcannot|\bneither|\bnone|\bnobody|\bno\s+(?:one|way|chance|reason)|\bwrong|\bincorrect"
    r"|\bfalse|\beliminate[sd]?|\bunlikely|\bimpossible|\bimprobable|\bhardly"
    r"|(?<!\bno )(?<!\bany )(?<!\ba )(?<!out )\bdoubt\w*"
    r"|\bmistake\w*|\bif|\bwhether|\bunless|\bsuppos\w+|\bassum\w+)\W*(?:\w+\W+){0,4}$"
)
# A letter behind any other word than these ends a name: "Vitamin C", "Hepatitis B", "Schedule A".
_ENDS_A_NAME = re.compile(
    r"(?i)\w(?<!\bthat)(?<!\bthink)(?<!\bbelieve)(?<!\bsay)(?<!\bconclude)(?<!\bclearly)(?<!\bonly)(?<!\bmeans)"
    r"(?<!\bguess)(?<!\bknow)(?<!\bor)(?<!\bnor)(?<!\bis)(?<!\bobviously)(?<!\bprobably)[\s\"'“]*\Z"
)
_ALONE = re.compile(
    r"[\s$*_#\"'`>(\[-]*(?:(?i:so|thus|hence|therefore|option|choice|answer|letter)\b[,:]?[\s$*_\"'`(\[]*){0,2}"
    r"(?:\\text\s*\{)?(?P<letter>[A-Za-j])[)\]}*_\"'`$.:!\s]*"
)
# "…, so B.", "…. Therefore, (B)."
_CONCLUDED = re.compile(
    r"(?i:\b(?:so|thus|hence|therefore)\b[,:]?\s+(?:(?:option|choice|answer|letter)\s+)?)[*(\[$]*(?P<letter>[A-Z])[)\]*$.!]*\Z"
)
# A remark behind an option: "Rome, not Paris", "Rome because …".
_REMARK = re.compile(
    r"(?i)(?:,\s*|\s\()(?:and\s+)?not\b|,?\s(?:because|since|rather\s+than|instead\s+of)\b|,\s*(?:as|so|which)\b"
)
# An option's words and then its letter: "Rome (B)", "Rome, option B", "Rome, which is (B)".
_LETTERED = re.compile(
    r"(?:(?i:so|thus|hence|therefore|it\s+is)\b,?\s+)?(?P<text>\S.*?)[*_\"'`]*(?:\s*[,;:–—-]?\s*(?i:which\s+is|that\s+is|i\.e\.,?))?"
    r"(?:\s*[,;:–—-]?\s*[(\[*]*(?i:option|choice|answer|letter)\s+[(\[*]*|\s*[,;:–—-]?\s*[*]*[(\[])"
    r"(?P<letter>[A-Z])[)\]*_\"'`$.!\s]*"
)
# Of an option and its letter.
_LONGEST = 500
_QUESTION = re.compile(r"[)\]}*_\"'`$\s]*\?")
_LISTED = re.compile(r"[\s*_\"'`>-]*[(\[]?(?P<letter>[A-Z])(?:[)\]:]|\.(?!\w))[)\]*]*\s*(?P<text>\S.*)")


def extract(text: str) -> str | None:
    """The letter `text` settles on, upper case; a boxed answer that is no letter in lower case; None without one."""
    letter, words = _settled(text)
    if letter is None and words and (lettered := _lettered(words)) and not _NEGATED.search(lettered["text"] + " "):
        return lettered["letter"]
    return letter or (_plain(_REMARK.split(words)[0]) or None if words and not _asks(words) else None)


def check(text: str, item: Mapping[str, Any]) -> bool:
    """Whether `text` settles on the letter `item["gold"]`, or repeats that one of the options `item["options"]`.

    A letter beside the text of another option ("A) Rome" or "Rome (A)", where Rome is option B) settles on nothing, and
    a question no more than that.
    """
    letter, words = _settled(text)
    if letter is None and words is None:
        lines = [line for line in reasoning.removed(text).strip().splitlines() if line.strip()]
        words = lines[-1] if lines else None
    options = item.get("options") or ()
    if words is not None and (named := _option(words, options)):
        letter = named if letter in (None, named) else None
    elif letter is None and words is not None and (lettered := _lettered(words)):
        letter = lettered["letter"] if _option(lettered["text"], options) == lettered["letter"] else None
    return letter == item["gold"]


def _option(words: str, options: Sequence[str]) -> str | None:
    asks = _asks(words)
    plain = [_plain(option) if _asks(option) or not asks else "" for option in options]
    for wanted in (_plain(words), _plain(_REMARK.split(words)[0])):
        if named := [LETTERS[i] for i, option in enumerate(plain) if option and option == wanted]:
            return named[0] if len(named) == 1 else None
    return None


def _lettered(words: str) -> re.Match | None:
    return _LETTERED.fullmatch(" ".join(words.split())) if len(words) <= _LONGEST else None


def _asks(words: str) -> bool:
    return words.rstrip(" *_\"'`").endswith("?")


def _settled(text: str) -> tuple[str | None, str | None]:
    """The letter and the words of the final answer, either of which can be missing."""
    text = unicodedata.normalize("NFKC", reasoning.removed(text))
    if (boxed := final.marked(text)) is not None:
        return _labelled(final.unwrapped(boxed))
    for pattern in (*_STATED, _REASONED):
        for match in reversed(list(pattern.finditer(text))):
            clause = _clause(text, match.start())
            if _NEGATED.search(clause):
                continue
            rest = match.end("letter")
            if _QUESTION.match(text, rest):
                continue
            if _SEVERAL.match(text, rest):
                return None, ""
            if pattern is _STATED[1]:
                if match[0][0] == match["letter"] and _ENDS_A_NAME.search(clause):
                    continue
                if _SEVERAL_BEFORE.search(text[max(0, match.start() - 20) : match.start("letter")]):
                    return None, ""
            elif match["letter"] in "aAI" and not _GOES_ON.match(text, rest):
                continue
            if match["letter"].islower() and not _GOES_ON.match(text, rest):
                continue
            # "The answer is A) Rome"
            return match["letter"].upper(), text[rest : rest + 500].partition("\n")[0].lstrip(
                " )]}*_\"'`$.,:(–—-"
            ) or None
    stated = list(re.finditer(r"(?i)\banswer[*_\"']*(?:\s+is|\s*:)\s*:?\s*([^\n]+)", text))
    if stated:
        said = [match[1] for match in stated if not _NEGATED.search(_clause(text, match.start()))]
        return None, said[-1].strip(" *_.\"'}") if said else ""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    if not lines:
        return None, None
    if alone := _ALONE.fullmatch(lines[-1]):
        return alone["letter"].upper(), None
    if concluded := _CONCLUDED.search(lines[-1].strip()[-80:]):
        return concluded["letter"], None
    listed = [m for line in lines if (m := _LISTED.fullmatch(line))]
    # Options repeated from the question are no answer.
    if (
        len({m["letter"] for m in listed}) == 1
        and listed[-1].string in (lines[0], lines[-1])
        and not _ALONE.fullmatch(listed[-1]["text"])
    ):
        return listed[-1]["letter"], listed[-1]["text"]
    return None, None


def _clause(text: str, end: int) -> str:
    """What stands before `end` in the same clause."""
    return _CLAUSE.split(text[max(0, end - 80) : end])[-1]


def _labelled(answer: str) -> tuple[str | None, str | None]:
    """Letter and words of "B", "(b)", "B) Rome", "B. Rome", "option B"; words alone of anything else."""
    answer = re.sub(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1", answer).strip(" $*")
    answer = re.sub(r"(?i)^(?:option|choice|answer)\s*:?\s+(?=\W?[a-j]\b)", "", answer)
    if alone := _ALONE.fullmatch(answer):
        return alone["letter"].upper(), None
    if (listed := _LISTED.fullmatch(answer)) and not _ALONE.fullmatch(listed["text"]):
        return listed["letter"], listed["text"]
    return None, answer


def _plain(text: str) -> str:
    """Lower case, without LaTeX, punctuation around words, articles and doubled spaces."""
    text = re.sub(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\[,;!: ]|[\"'`*_$]", "", text).casefold().strip(" .:;,!?()[]")
    text = re.sub(r"\s+", " ", text)
    return re.sub(r"^(?:a|an|the) (?=\S)", "", text)
