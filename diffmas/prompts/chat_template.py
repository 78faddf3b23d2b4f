"""A model's chat template: the options it is given, and what it writes around an answer."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from diffmas.prompts.control_tokens import ControlTokens, unused_mark
from diffmas.prompts.dates import template_options
from diffmas.support.failures import TEMPLATE_ERRORS

Chat = Sequence[Mapping[str, str]]

#: Settled here, so that no option may name it: how a template is called, and what pins its date.
_SETTLED = {
    *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters, "messages", "pinned_date",
} - {"tools", "documents"}  # fmt: skip


def parse_kwargs(value: str | Mapping[str, Any] | None, name: str = "chat_template_kwargs") -> dict[str, Any]:
    """Options for a chat template from a JSON object, in text or read already.

    Raises:
        ValueError: anything else, or an option that is not a template's; it is called `name`.
    """
    try:
        options = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError:
        options = value
    if options is None:
        return {}
    if not isinstance(options, Mapping) or not all(isinstance(key, str) for key in options):
        raise ValueError(f'{name} is {value!r}; allowed: a JSON object, e.g. {{"enable_thinking": false}}')
    if taken := [key for key in options if key in _SETTLED]:
        raise ValueError(f"{name} has {taken}, which are settled already; allowed: what a chat template asks for")
    return dict(options)


def render(
    tokenizer: PreTrainedTokenizerBase,
    chat: Chat,
    options: Mapping[str, Any] = {},
    date: str | None = None,
    *,
    ready: bool = True,
    going_on: bool = False,
) -> str:
    """The chat as the tokenizer's template writes it, `ready` for an answer, or with its last message `going_on`.

    Raises:
        ValueError: an option that the template never reads.
    """
    if unread := [key for key in options if not reads(tokenizer, key)]:
        raise ValueError(
            f"chat_template_kwargs has {unread}, which the model's chat template never reads; allowed: what it asks for"
        )
    given = {**options, **template_options(tokenizer, date)}
    turns = [dict(turn) for turn in chat]
    written = tokenizer.apply_chat_template(
        turns, tokenize=False, add_generation_prompt=ready, continue_final_message=going_on, **given
    )
    return str(written)


def reads(tokenizer: PreTrainedTokenizerBase, option: str) -> bool:
    """Whether the tokenizer has a chat template that names `option`."""
    return bool(tokenizer.chat_template) and bool(
        re.search(rf"\b{re.escape(option)}\b", str(tokenizer.get_chat_template()))
    )


def answer_start(tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any] = {}, date: str | None = None) -> str:
    """What the chat template writes between a question and its answer; nothing where there is no template."""
    if not tokenizer.chat_template:
        return ""
    mark = unused_mark([tokenizer.chat_template])
    return render(tokenizer, [{"role": "user", "content": mark}], options, date).rpartition(mark)[2]


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that ends an answer: the first control token that the chat template writes behind one.

    The tokenizer's end-of-sequence token (None: it has none) where there is no template, or it writes no such token.
    """
    if tokenizer.chat_template:
        mark = unused_mark([tokenizer.chat_template])
        chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
        try:
            _, found, behind = render(tokenizer, chat, ready=False).rpartition(mark)
        except TEMPLATE_ERRORS:
            # It takes no answers.
            found = behind = ""
        ending = ControlTokens.of(tokenizer).first(behind) if found else None
        if ending is not None:
            return ending
    return tokenizer.eos_token_id
