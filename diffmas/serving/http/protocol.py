"""Bodies of requests, checked field by field, and what they are answered with: OpenAI's formats."""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from transformers import PreTrainedTokenizerBase

from diffmas.agents.collator import Collator
from diffmas.generation.decoding import Decoding
from diffmas.serving.http.backends import Piece, Question
from diffmas.support.text_file import check_characters
from diffmas.system import MultiAgentSystem


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Attributes:
        body_bytes: of its body. prompt_tokens: of all agents' prompts. new_tokens: of an answer.
        answers: of one question (`n`). stop_strings: and characters of each.
    """

    body_bytes: int = 1 << 20
    prompt_tokens: int = 32_768
    new_tokens: int = 32_768
    answers: int = 16
    stop_strings: int = 4
    stop_characters: int = 256

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} is {value}; allowed: integers ≥ 1")


class _Strict(BaseModel):
    # What is not known here would be ignored.
    model_config = ConfigDict(extra="forbid")


class StreamOptions(_Strict):
    """What a stream brings along."""

    include_usage: bool = False


class _Body(_Strict):
    """What both kinds of request have in common."""

    model: str | None = None
    item: dict[str, Any] | None = Field(None, description="The fields that the agents' prompts name.")
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int = Field(1, ge=1)
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=0, lt=2**63)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    # Only what changes nothing.
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None

    @property
    def longest(self) -> int | None:
        """The most tokens of an answer."""
        return self.max_tokens

    @property
    def wants_logprobs(self) -> bool:
        """Of every token."""
        raise NotImplementedError

    def given(self) -> dict[str, Any] | str:
        """The item's fields, or a text that stands for them."""
        raise NotImplementedError


class TextPart(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """A message of a chat: the prompts of the agents are the run's, so that a question is all there is to say."""

    role: Literal["user"]
    content: str | list[TextPart]
    name: str | None = None


class ChatBody(_Body):
    """Of `/v1/chat/completions`."""

    messages: list[Message] | None = Field(None, min_length=1, max_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: Literal[0] | None = None

    @property
    def longest(self) -> int | None:
        """See :class:`_Body`."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def wants_logprobs(self) -> bool:
        """See :class:`_Body`."""
        return self.logprobs

    def given(self) -> dict[str, Any] | str:
        """See :class:`_Body`."""
        if (self.item is None) == (self.messages is None):
            raise ValueError("item and messages are both given or both missing; allowed: one of the two")
        if self.item is not None:
            return self.item
        content = self.messages[0].content
        return content if isinstance(content, str) else "".join(part.text for part in content)


class CompletionBody(_Body):
    """Of `/v1/completions`."""

    prompt: str | None = None
    logprobs: Literal[0] | None = None

    @property
    def wants_logprobs(self) -> bool:
        """See :class:`_Body`."""
        return self.logprobs is not None

    def given(self) -> dict[str, Any] | str:
        """See :class:`_Body`."""
        if (self.item is None) == (self.prompt is None):
            raise ValueError("item and prompt are both given or both missing; allowed: one of the two")
        return self.prompt if self.item is None else self.item


class Reader:
    """Makes questions of bodies.

    Args:
        system: its prompts and its decoding hold where a body says nothing else.
        name: what it is called.

    Attributes:
        fields: what its agents' prompts ask for.
    """

    def __init__(self, system: MultiAgentSystem, name: str, limits: Limits):
        self._collator: Collator = system.collator
        self.tokenizer: PreTrainedTokenizerBase = system.tokenizer
        self.name, self.limits, self._decoding = name, limits, system.decoding
        # Tokenizers do not promise to be used by several threads at once.
        self._lock = threading.Lock()
        roles = [agent.role for agent in system.topology.agents]
        self.fields = list(dict.fromkeys(f for role in roles for f in system.prompts.fields(role)))

    def question(self, body: _Body) -> Question:
        """What `body` asks.

        Raises:
            ValueError: a field that does not fit, named.
        """
        if body.model not in (None, self.name):
            raise ValueError(f"model is {body.model!r}; allowed: {self.name}")
        decoding = self._decoded(body)
        item = self._item(body.given())
        with self._lock:
            encoded = self._collator.encode_prompts([item])
        question = Question(encoded["prompt_ids"], decoding)
        if question.prompt_tokens > (most := self.limits.prompt_tokens):
            raise ValueError(f"the agents' prompts have {question.prompt_tokens} tokens; allowed: up to {most}")
        return question

    def _item(self, given: dict[str, Any] | str) -> dict[str, Any]:
        if isinstance(given, str):
            if len(self.fields) == 1:
                given = {self.fields[0]: given}
            else:
                try:
                    given = json.loads(given)
                except ValueError:
                    given = None
                if not isinstance(given, dict):
                    raise ValueError(f"the text is no JSON object; allowed: one with the fields {self.fields}, or item")
        if missing := [name for name in self.fields if name not in given]:
            raise ValueError(f"item lacks {missing}; allowed: {self.fields}, which the agents' prompts name")
        if unread := [name for name in given if name not in self.fields]:
            raise ValueError(f"item has {unread}, which no prompt names; allowed: {self.fields}")
        check_characters(given, "item")
        return given

    def _decoded(self, body: _Body) -> Decoding:
        limits, stop = self.limits, [body.stop] if isinstance(body.stop, str) else body.stop or []
        if len(stop) > limits.stop_strings or any(len(s) > limits.stop_characters for s in stop):
            raise ValueError(
                f"stop has {len(stop)} strings of up to {max(map(len, stop))} characters; allowed: "
                f"{limits.stop_strings} of {limits.stop_characters}"
            )
        if body.n > limits.answers:
            raise ValueError(f"n is {body.n}; allowed: 1 to {limits.answers}")
        longest = min(self._decoding.max_new_tokens, limits.new_tokens) if body.longest is None else body.longest
        if longest > limits.new_tokens:
            raise ValueError(f"max_tokens is {longest}; allowed: up to {limits.new_tokens}")
        own = {k: v for k in ("temperature", "top_p") if (v := getattr(body, k)) is not None}
        seed = secrets.randbits(31) if body.seed is None else body.seed
        changes = {"max_new_tokens": longest, "samples": body.n, "stop": tuple(stop), "seed": seed, **own}
        return replace(self._decoding, **changes)


class Reply:
    """What one question is answered with, in the format that was asked for."""

    def __init__(self, reader: Reader, body: _Body, question: Question):
        self._reader, self._body, self._question = reader, body, question
        self._chat = isinstance(body, ChatBody)
        self._about = {
            "id": ("chatcmpl-" if self._chat else "cmpl-") + secrets.token_hex(12),
            "object": "chat.completion" if self._chat else "text_completion",
            "created": int(time.time()),
            "model": reader.name,
        }
        self._offsets = [0] * body.n
        self._spent = [0] * body.n

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """All of it at once."""
        choices = []
        for sample in range(self._body.n):
            own = [piece for piece in pieces if piece.sample == sample]
            text = "".join(piece.text for piece in own)
            said = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
            tokens = [token for piece in own for token in piece.tokens]
            logprobs = [value for piece in own for value in piece.logprobs]
            self._spent[sample] = own[-1].spent
            choices.append(self._choice(sample, said, tokens, logprobs, own[-1].finish))
        return {**self._about, "choices": choices, "usage": self.usage()}

    def first(self) -> list[dict[str, Any]]:
        """Chunks in front of a stream's pieces."""
        if not self._chat:
            return []
        said = {"delta": {"role": "assistant", "content": ""}}
        return [self._chunk([self._choice(sample, said, (), (), None)]) for sample in range(self._body.n)]

    def chunk(self, piece: Piece) -> dict[str, Any] | None:
        """Of a stream; None where there is nothing to say yet."""
        self._spent[piece.sample] = piece.spent
        if not piece.text and piece.finish is None and not self._body.wants_logprobs:
            return None
        said: dict[str, Any] = {"text": piece.text}
        if self._chat:
            said = {"delta": {"content": piece.text} if piece.text or piece.tokens else {}}
        return self._chunk([self._choice(piece.sample, said, piece.tokens, piece.logprobs, piece.finish)])

    def last(self) -> list[dict[str, Any]]:
        """Chunks behind a stream's pieces."""
        options = self._body.stream_options
        return [{**self._chunk([]), "usage": self.usage()}] if options and options.include_usage else []

    def usage(self) -> dict[str, int]:
        """Tokens of the agents' prompts and of the answers, stop tokens among them."""
        prompt, answers = self._question.prompt_tokens, sum(self._spent)
        return {"prompt_tokens": prompt, "completion_tokens": answers, "total_tokens": prompt + answers}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return {**self._about, "object": kind, "choices": choices}

    def _choice(
        self, sample: int, said: Mapping[str, Any], tokens: Sequence[int], logprobs: Sequence[float], finish: str | None
    ) -> dict[str, Any]:
        found = self._logprobs(sample, tokens, logprobs) if self._body.wants_logprobs else None
        return {"index": sample, **said, "logprobs": found, "finish_reason": finish}

    def _logprobs(self, sample: int, tokens: Sequence[int], logprobs: Sequence[float]) -> dict[str, Any]:
        texts = [self._reader.tokenizer.decode([token]) for token in tokens]
        if self._chat:
            entries = [
                {"token": text, "logprob": value, "bytes": list(text.encode()), "top_logprobs": []}
                for text, value in zip(texts, logprobs, strict=True)
            ]
            return {"content": entries}
        offsets = []
        for text in texts:
            offsets.append(self._offsets[sample])
            self._offsets[sample] += len(text)
        return {"tokens": texts, "token_logprobs": list(logprobs), "top_logprobs": None, "text_offset": offsets}


def error_body(message: str, kind: str, code: int) -> dict[str, Any]:
    """What a request that fails is answered with."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
