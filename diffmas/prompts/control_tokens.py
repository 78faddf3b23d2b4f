"""Control tokens count where a role prompt or a chat template writes them; where an item spells one, it is text."""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

_KNOWN: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, ControlTokens] = weakref.WeakKeyDictionary()
#: Letters of a script (Yi) that hardly any text holds; they have no case and `repr` leaves them alone.
_RARE = [chr(code) for code in range(0xA000, 0xA48D)]


class ControlTokens:
    """The special tokens of a tokenizer, and how to read a text that spells them.

    What an item spells is replaced by marks (:meth:`marked`), which go through role prompt and chat template like any
    text. The result is read in one piece by a copy of the tokenizer that knows its special tokens by other names, so
    that ordinary text becomes the tokens it always does.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = weakref.proxy(tokenizer)
        self._names = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._ids = {name: i for i, name in self._names.items()}
        # The longest first, as tokenizers match them.
        longest = sorted(self._ids, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest)) or "(?!)")
        self._copies: dict[str, tuple[Tokenizer, dict[int, int]]] = {}

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> ControlTokens:
        """Those of `tokenizer`, found once."""
        if tokenizer not in _KNOWN:
            _KNOWN[tokenizer] = cls(tokenizer)
        return _KNOWN[tokenizer]

    def spelled_in(self, value: Any) -> bool:
        """Whether a text, or one anywhere in a list or mapping, spells a special token."""
        return any(self._pattern.search(text) for text in _texts(value))

    def marked(self, value: Any, mark: str) -> Any:
        """`value` with each special token that its texts spell as a number between two letters `mark`."""
        if isinstance(value, str):
            return self._pattern.sub(lambda found: f"{mark}t{self._ids[found[0]]}{mark}", value)
        if isinstance(value, Mapping):
            return {key: self.marked(item, mark) for key, item in value.items()}
        return type(value)(self.marked(item, mark) for item in value) if type(value) in (list, tuple) else value

    def encode(self, text: str, mark: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text in which :meth:`marked` has replaced what items spell.

        Raises:
            ValueError: a tokenizer that cannot read a special token as text, or a template that took a mark apart.
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
        """The tokenizer with its special tokens under the names `encode` gives them, and what its added ones mean."""
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


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts in which nothing is a control token, without any that the tokenizer would add."""
    if not texts:
        return []
    control = ControlTokens.of(tokenizer)
    rows = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    for i, text in enumerate(texts):
        if control.spelled_in(text):
            mark = unused_mark([text])
            rows[i] = control.encode(control.marked(text, mark), mark)
    return rows


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
