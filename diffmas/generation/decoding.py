"""How answers are decoded, and what comes out."""

from __future__ import annotations

from dataclasses import dataclass
from operator import index
from typing import NamedTuple


@dataclass(frozen=True)
class Decoding:
    """How answers are decoded: greedy at temperature 0, otherwise sampled from the top-p nucleus.

    Args:
        max_new_tokens: longest answer, its stop token included.
        temperature, top_p: of sampling; the nucleus is taken after the temperature and keeps the token that crosses
            `top_p` (Holtzman et al., arXiv 1904.09751).
        seed: rows take `seed + row` where they are given no seeds of their own.
        samples: answers a row.
        stop: strings that end an answer; the text is cut before the first one to appear.
        max_rows: answers decoded at once.

    Raises:
        ValueError: an argument outside its range, named.
    """

    max_new_tokens: int = 2048
    temperature: float = 0.6
    top_p: float = 0.95
    seed: int = 0
    samples: int = 1
    stop: tuple[str, ...] = ()
    max_rows: int = 64

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "samples", "max_rows"):
            if index(getattr(self, name)) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: integers ≥ 1")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; allowed: finite and ≥ 0 (0 is greedy)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; allowed: 0 < top_p ≤ 1")
        if index(self.seed) < 0:
            raise ValueError(f"seed is {self.seed}; allowed: integers ≥ 0")
        if isinstance(self.stop, str) or not all(isinstance(s, str) and s for s in self.stop):
            raise ValueError(f"stop is {self.stop!r}; allowed: a sequence of strings, none of them empty")
        object.__setattr__(self, "stop", tuple(self.stop))


@dataclass(frozen=True)
class Completion:
    """One answer.

    Attributes:
        tokens: token ids without the stop token; those that spell a stop string are part of them.
        text: decoded without special tokens, cut before a stop string.
        logprobs: natural log-probability of every chosen token, stop token included, under the model's own
            distribution (temperature 1, before top-p).
        entropies: of that distribution, in nats, beside every log-probability.
        finish: "stop" or "length".
        seconds: from the row's admission, its senders' work included, to the end.
    """

    tokens: list[int]
    text: str
    logprobs: list[float]
    entropies: list[float]
    finish: str
    seconds: float


class Event(NamedTuple):
    """One token of a stream; the last one of every answer carries its completion.

    `text` is what has become certain: a character that is not complete yet, and what may turn out to be a stop
    string, are held back. An answer's texts, joined, are its completion's.
    """

    row: int
    sample: int
    token: int
    text: str
    completion: Completion | None = None
