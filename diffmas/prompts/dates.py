"""The date that a chat template writes: the run's own, whatever day it is."""

from __future__ import annotations

from datetime import date
from functools import lru_cache
from string import ascii_letters
from typing import Any

from transformers import PreTrainedTokenizerBase

#: What transformers calls the function by which a template asks for the date.
_NOW = "strftime_now"
#: Put before a template, this takes the place of transformers' function. The last expression keeps what trimming would
#: take from the template's own beginning.
_PINNED = (
    "{%- macro strftime_now(format) -%}{%- set pinned = namespace(text=format) -%}"
    "{%- for key, value in pinned_date.items() -%}{%- set pinned.text = pinned.text.replace(key, value) -%}"
    "{%- endfor -%}{{ pinned.text }}{%- endmacro -%}{{ '' }}"
)


def writes_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's chat template asks for today's date."""
    return bool(tokenizer.chat_template) and _NOW in tokenizer.get_chat_template()


def parse_date(text: str) -> date:
    """A date, of the form 2026-01-31.

    Raises:
        ValueError: anything else.
    """
    try:
        return date.fromisoformat(text)
    except (TypeError, ValueError):
        raise ValueError(f"date is {text!r}; allowed: a date such as 2026-01-31") from None


def template_options(tokenizer: PreTrainedTokenizerBase, day: str | None) -> dict[str, Any]:
    """What `apply_chat_template` is to be given so that the template writes `day`; None: nothing, it writes today's."""
    if day is None or not writes_date(tokenizer):
        return {}
    return {"chat_template": _PINNED + tokenizer.get_chat_template(), "pinned_date": _directives(day)}


@lru_cache
def _directives(day: str) -> dict[str, str]:
    """What `strftime` makes of each of its directives on `day`, at midnight."""
    directives = [sign + letter for sign in ("%-", "%") for letter in ascii_letters]
    written = {directive: parse_date(day).strftime(directive) for directive in directives}
    return {directive: text for directive, text in written.items() if "%" not in text}


def today() -> str:
    """Today's date, as a run keeps it."""
    return date.today().isoformat()


def print_date(tokenizer: PreTrainedTokenizerBase, day: str | None) -> None:
    """Say which date the chat template writes, where it writes one."""
    if writes_date(tokenizer):
        print(f"the chat template writes a date: {day or today()}, whatever day it is (--date)", flush=True)
