"""Plain numbers, exactly: integers, decimals, thousands separators, fractions, money, percent, a unit behind."""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

#: Longer ones are no answers; Python refuses to convert integers of more than 4300 digits.
LONGEST = 1000
DIGITS = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
_POWER = (
    r"(?:[eE](?P<power>[-+]?[0-9]{1,3})"
    r"|\s?(?:\*|×|\\times|\\cdot)\s?10\s?(?:\^|\*\*)\s?(?:\{\s*(?P<power1>[-+]?[0-9]{1,3})\s*\}|(?P<power2>[-+]?[0-9]{1,3})))"
)
_NUMBER = re.compile(rf"(?P<sign>[-+]?)\$?\s?(?P<digits>{DIGITS}){_POWER}?")
_SLASH = re.compile(
    rf"(?P<sign>[-+]?)(?:(?P<whole>[0-9]+)\s(?=[0-9]+\s?/))?(?P<above>{DIGITS})\s?/\s?(?P<below>[-+]?{DIGITS})"
)
_FRAC = re.compile(
    rf"(?P<sign>[-+]?)(?P<whole>[0-9]+)?\s?\\[dt]?frac\s*(?:\{{\s*(?P<above>[-+]?{DIGITS})\s*\}}\s*\{{\s*(?P<below>[-+]?{DIGITS})\s*\}}"
    r"|(?P<above1>[0-9])\s*(?P<below1>[0-9]))"
)
# In 2x, 6i and 3ab the letters are no unit.
_VARIABLES = r"(?:[abciknpqrtuvxyzBDEGHIMOPQRSTXYZ]|[abcnpqxyz]{2,3})(?:\s*[\^/]|\s*$)"
_UNIT = re.compile(
    r"(?:\\(?:text|mathrm|textbf|mbox)\s*\{\s*[^{}0-9(]*(?:\([^{}()]*\)\s*)?\}|"
    r"\\[dt]?frac\s*\{\s*\\(?:text|mathrm)\s*\{[^{}0-9]*\}\s*\}\s*\{\s*\\(?:text|mathrm)\s*\{[^{}0-9]*\}\s*\}|"
    rf"(?<![A-Za-z])/?(?!{_VARIABLES})[A-Za-z]+(?:(?: +|/)[A-Za-z]+)* *\.?)"
    r"(?:\s*\^\s*\{?[23]\}?|[²³])?$"
)
#: Words that multiply the number before them.
SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SCALED = re.compile(rf"(?i)^(?:\\(?:text|mathrm|textbf|mbox)\s*\{{)?\s*({'|'.join(SCALES)})s?\b")
_LOOSE = (
    (re.compile(r",\\!\s*"), ","),
    (re.compile(r"\\[,;!: ]|~|\\quad"), " "),
    (re.compile(r"\\(?=[$%])|\\(?:left|right)(?![a-zA-Z])|\\(?:text|mathrm)\{\s*\}"), ""),
    (re.compile(r"\$?\s*(?:\^\s*\{?\\circ\}?|°)\$?"), ""),
    (re.compile(r"^[–‒]\s*(?=[$.0-9\\])"), "-"),
    (re.compile(r"^\{+([^{}]*)\}+$"), r"\1"),
)
_CURRENCY = re.compile(r"[€£¥₹]|\\(?:euro|pounds)(?![a-zA-Z])")
# Thousands apart by the spaces made for it.
_SPACED = re.compile(r"(?<=[0-9])[\u00a0\u2009\u202f](?=[0-9]{3}(?![0-9]))")
# So are they by plain spaces, where nothing but a word follows: "1 000 000 dollars".
_APART = re.compile(r"\W{0,4}[1-9][0-9]{0,2}(?: [0-9]{3})+(?:\.[0-9]+)?(?:\s*(?:\\?%|[^\W\d_]+))?\W{0,4}")
_WIDE = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: " ", 0x2044: "/"}
_VULGAR = re.compile(r"(?P<whole>[0-9])?\s?(?P<fraction>[¼-¾⅐-⅞↉])")
_RAISED = re.compile(r"(?<=[0-9)}\]])[⁺⁻]?[⁰¹²³⁴-⁹]+")
# A sign behind a word or a bracket is an operator: "5-10" ends on 10. A power is one number with what it is of.
_IN_TEXT = re.compile(
    rf"(?<![0-9.])(?:(?<![\w)])[-+−–])?\\?\$?(?:[0-9]{{1,3}} (?=[0-9]{{1,2}}/[0-9]))?{DIGITS}"
    r"(?:[eE][-+]?[0-9]{1,3}(?!\w)|/[0-9]+(?![0-9/]|\.[0-9]))?(?![0-9])"
    r"(?:\s?(?:\^|\*\*)\s?(?:\{[^{}]*\}|[-+]?[0-9]+))?"
    rf"(?: (?i:{'|'.join(SCALES)})s?\b)?"
)


def plain(text: str) -> str:
    """Full-width characters, fractions and exponents of one character, as typed: "２½" is "2 1/2", "2³" "2^{3}".

    A raised digit behind a letter stays: it is a unit's, or a variable's.
    """
    text = text.translate(_WIDE)
    text = _VULGAR.sub(lambda m: (f"{m['whole']} " if m["whole"] else "") + _typed(m["fraction"]), text)
    return _RAISED.sub(lambda m: f"^{{{_typed(m[0])}}}", text)


def _typed(characters: str) -> str:
    return unicodedata.normalize("NFKC", characters).replace("⁄", "/").replace("−", "-").lstrip("+")


def joined(text: str) -> str:
    """Without the plain spaces that set thousands apart, where the number is all of the text but for a unit."""
    return re.sub(r"(?<=[0-9]) (?=[0-9]{3}(?![0-9]))", "", text) if _APART.fullmatch(text) else text


def parse(text: str) -> Fraction | None:
    r"""The one number that `text` is: "$70,000.00" is 70000, `\frac{1}{2}` is 1/2; None where it is anything else."""
    if len(text) > LONGEST:
        return None
    text = _SPACED.sub(",", plain(text).strip().rstrip(".").strip()).replace("\u2212", "-").replace("{,}", ",")
    text = _CURRENCY.sub("$", re.sub(r"^(?:\\approx|≈)\s*", "", text))
    for pattern, replacement in _LOOSE:
        text = pattern.sub(replacement, text)
    text = text.strip().rstrip("$%").strip()
    if wrapped := re.fullmatch(r"\(\s*([^()]+?)\s*\)", text):
        text = wrapped[1]
    if not re.match(r"[-+]?\s*[$\\.0-9]", text):
        return None
    scale = 1
    if (unit := _UNIT.search(text)) and re.search(r"[0-9}]\$?\s*$", text[: unit.start()]):
        if scaled := _SCALED.search(unit[0]):
            scale = SCALES[scaled[1].casefold()]
        text = text[: unit.start()].strip().rstrip("$%").strip()
    text = re.sub(r"^([-+])\s+", r"\1", text)
    if text.startswith("$") and not _NUMBER.fullmatch(text):
        text = text[1:]
    for pattern in (_NUMBER, _SLASH, _FRAC):
        if match := pattern.fullmatch(text):
            parts = match.groupdict()
            value = _decimal(parts.get("digits") or parts.get("above") or parts["above1"])
            below = _decimal(parts.get("below") or parts.get("below1") or "1")
            whole = int(parts.get("whole") or 0)
            # Behind a whole number, only a proper fraction makes a mixed one.
            if below == 0 or (parts.get("whole") and not 0 < value < below):
                return None
            power = next((parts[name] for name in ("power", "power1", "power2") if parts.get(name)), "0")
            return scale * (whole + value / below) * Fraction(10) ** int(power) * (-1 if parts["sign"] == "-" else 1)
    return None


def _decimal(text: str) -> Fraction:
    text = text.replace(",", "")
    sign, text = (-1, text[1:]) if text[0] == "-" else (1, text.lstrip("+"))
    whole, _, part = text.partition(".")
    return sign * Fraction(int(whole + part), 10 ** len(part))


def last(text: str) -> str | None:
    """The last number in running text, as written."""
    found = _IN_TEXT.findall(_SPACED.sub(",", text.replace("{,}", ",")))
    return found[-1] if found else None


def normal(value: Fraction) -> str:
    """One string per number: a decimal where it ends, a fraction otherwise."""
    below, twos, fives = value.denominator, 0, 0
    while below % 2 == 0:
        below, twos = below // 2, twos + 1
    while below % 5 == 0:
        below, fives = below // 5, fives + 1
    if below != 1:
        return f"{value.numerator}/{value.denominator}"
    places = max(twos, fives)
    digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
    sign = "-" if value < 0 else ""
    return sign + (f"{digits[:-places]}.{digits[-places:]}" if places else digits)
