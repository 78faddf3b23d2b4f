"""Control tokens count where a role prompt or a chat template writes them; where an item spells one, it is text."""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from diffmas.support.failures import TEMPLATE_ERRORS

_KNOWN: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, tuple[Any, ControlTokens]] = weakref.WeakKeyDictionary()
#: How the mark of a turn begins, unlike an added token for line breaks.
_MARK = re.compile(r"[<\[]\S+")
#: Letters of a script (Yi) that hardly any text holds; they have no case and `repr` leaves them alone.
_RARE = [chr(code) for code in range(0xA000, 0xA48D)]


class ControlTokens:
    """The control tokens of a tokenizer, and how to read a text that spells them.

    They are its special tokens, and those others that its chat template marks turns with (as DeepSeek-R1's does).
    What an item spells is replaced by marks (:meth:`marked`), which go through role prompt and chat template like any
    text. The result is read in one piece by a copy of the tokenizer that knows its special tokens by other names, so
    that ordinary text becomes the tokens it always does.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = weakref.proxy(tokenizer)
        frame = _frame(tokenizer)
        self._names = {
            i: token.content
            for i, token in tokenizer.added_tokens_decoder.items()
            if token.special or (token.content in frame and _MARK.fullmatch(token.content))
        }
        self._ids = {name: i for i, name in self._names.items()}
        # The longest first, as tokenizers match them.
        longest = sorted(self._ids, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest)) or "(?!)")
        self._copies: dict[str, tuple[Tokenizer, dict[int, int]]] = {}

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> ControlTokens:
        """Those of `tokenizer` with its chat template, found once."""
        template, known = _KNOWN.get(tokenizer, (None, None))
        if known is None or template != tokenizer.chat_template:
            _KNOWN[tokenizer] = tokenizer.chat_template, (known := cls(tokenizer))
        return known

    @property
    def ids(self) -> Set[int]:
        return self._names.keys()

    def spelled_in(self, value: Any) -> bool:
        """Whether a text, or one anywhere in a list or mapping, spells a control token."""
        return any(self._pattern.search(text) for text in _texts(value))

    def first(self, text: str) -> int | None:
        """The first control token in a text; None where there is none."""
        found = self._pattern.search(text)
        return None if found is None else self._ids[found[0]]

    def marked(self, value: Any, mark: str) -> Any:
        """`value` with each control token that its texts spell as a number between two letters `mark`."""
        if isinstance(value, str):
            return self._pattern.sub(lambda found: f"{mark}t{self._ids[found[0]]}{mark}", value)
        if isinstance(value, Mapping):
            return {key: self.marked(item, mark) for key, item in value.items()}
        return type(value)(self.marked(item, mark) for item in value) if type(value) in (list, tuple) else value

    def encode(self, text: str, mark: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text in which :meth:`marked` has replaced what items spell.

        Raises:
            ValueError: a tokenizer that cannot read a control token as text, or a template that took a mark apart.
        """
        text = self._pattern.sub(lambda found: f"{mark}c{self._ids[found[0]]}{mark}", text)
        control, spelled = f"{mark}c([0-9]+){mark}", f"{mark}t([0-9]+){mark}"
        if mark in re.sub(f"{control}|{spelled}", "", text):
            raise ValueError("a prompt takes the control tokens that an item spells apart; allowed: items without any")
        text = re.sub(spelled, lambda found: self._names[int(found[1])], text)
        copy, meant = self._copy(mark)
        encoding = copy.encode(text, add_special_tokens=add_special_tokens)
        ids = []
        for token, added in zip(encoding.ids, encoding.special_tokens_mask, strict=True):
            if not added and token not in meant and token in self._names:
                raise ValueError(
                    f"the tokenizer cannot read {self._names[token]!r} as text; allowed: items that do not spell it"
                )
            ids.append(token if added else meant.get(token, token))
        return ids

    def _copy(self, mark: str) -> tuple[Tokenizer, dict[int, int]]:
        """The tokenizer with its control tokens under the names `encode` gives them, and what its added ones mean."""
        if mark not in self._copies:
            if not self._tokenizer.is_fast:
                raise ValueError(
                    f"{type(self._tokenizer).__name__} cannot read control tokens as text; allowed: items that spell "
                    "none, or a model with a fast tokenizer"
                )
            description = json.loads(self._tokenizer.backend_tokenizer.to_str())
            for token in description["added_tokens"]:
                if token["id"] in self._names:
                    token["content"] = f"{mark}c{token['id']}{mark}"
            copy = Tokenizer.from_str(json.dumps(description))
            copy.no_truncation()
            copy.no_padding()
            # A token under another name can get another number.
            meant = {copy.token_to_id(token["content"]): token["id"] for token in description["added_tokens"]}
            self._copies[mark] = copy, meant
        return self._copies[mark]


def unused_mark(values: Iterable[Any]) -> str:
    """A letter that is in none of the texts in `values`."""
    used = {letter for text in _texts(values) for letter in text}
    return next(letter for letter in _RARE if letter not in used)


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[Sequence[str]], between: str = ""
) -> list[list[int]]:
    """Token ids of texts in parts, without any that the tokenizer would add.

    Nothing in the parts is a control token; what is written `between` them may be some.
    """
    if not texts:
        return []
    control = ControlTokens.of(tokenizer)
    rows = tokenizer([between.join(parts) for parts in texts], add_special_tokens=False)["input_ids"]
    for i, parts in enumerate(texts):
        if control.spelled_in(parts):
            mark = unused_mark([*parts, between])
            rows[i] = control.encode(between.join(control.marked([*parts], mark)), mark)
    return rows


def _frame(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template writes around turns that are over; nothing where it takes no such conversation."""
    chat = [{"role": role, "content": "?"} for role in ("user", "assistant", "user")]
    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False)) if tokenizer.chat_template else ""
    except TEMPLATE_ERRORS:
        # Reported where a prompt is filled in.
        return ""


def _texts(value: Any) -> Iterable[str]:
    """All texts in a nested value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)
