"""Text from tokens as they come: characters that span tokens, stop strings that span tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


def decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """Text without special tokens and without any tidying of spaces."""
    # Of one row it is one text.
    return cast(str, tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def cut(text: str, stop: Sequence[str]) -> str:
    """`text` before the first stop string in it."""
    return text[: min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))]


class TextStream:
    """The text of one growing answer.

    Attributes:
        stopped: a stop string has appeared.
        text: what is certain so far.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]):
        self._tokenizer, self._stop = tokenizer, stop
        self.stopped, self.text = False, ""
        # Decoded but held back: it may be the beginning of a stop string.
        self._held = ""
        # Decoding starts a few tokens back, since a token's text can depend on the one before it.
        self._window: list[int] = []
        self._old, self._known = 0, ""

    def push(self, token: int) -> str:
        """What became certain with `token`."""
        self._window.append(token)
        text = decode(self._tokenizer, self._window)
        if text.endswith(_INCOMPLETE):
            return ""
        piece = text[len(self._known) :]
        self._window = self._window[self._old :]
        self._old, self._known = len(self._window), decode(self._tokenizer, self._window)
        return self._release(piece)

    def finish(self, whole: str) -> str:
        """The rest, once the answer is there: its text is `whole`."""
        rest, self.text = whole[len(self.text) :], whole
        return rest

    def _release(self, piece: str) -> str:
        held = self._held + piece
        certain = cut(held, self._stop)
        self.stopped = len(certain) < len(held)
        if not self.stopped:
            overlap = max((_overlap(held, s) for s in self._stop), default=0)
            certain, self._held = held[: len(held) - overlap], held[len(held) - overlap :]
        self.text += certain
        return certain


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper beginning of `stop` that `text` ends on."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
