"""Choice of the next tokens; a row's draws come from its own generator."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

#: Most probable tokens looked at first; only a nucleus that is larger has the whole vocabulary sorted.
CANDIDATES = 256
# Up to here a sort of everything is no slower.
_SMALL_VOCABULARY = 1024
_BLOCK = 64


class Draws:
    """Uniform numbers in [0, 1) of one answer: they depend on its seed and its place among the row's samples alone."""

    def __init__(self, seed: int, sample: int):
        self._generator = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, sample))))
        self._next = np.empty(0)

    def peek(self, count: int) -> np.ndarray:
        """The next `count`, float64."""
        if (missing := count - len(self._next)) > 0:
            self._next = np.concatenate((self._next, self._generator.random(missing)))
        return self._next[:count]

    def skip(self, count: int) -> None:
        """Use up `count`."""
        self._next = self._next[count:]


class Uniforms:
    """The draws of a changing batch, a block of steps at a time on the device."""

    def __init__(self, device: torch.device):
        self._device = device
        self._draws: list[Draws] = []
        self._block, self._used = torch.empty(0, 0), 0

    def next(self, draws: list[Draws]) -> Tensor:
        """One number of each of `draws`, float64 `[len(draws)]`."""
        if draws != self._draws or self._used == _BLOCK:
            self.settle()
            self._draws = draws
            self._block = torch.from_numpy(np.stack([d.peek(_BLOCK) for d in draws], 1)).to(self._device)
        self._used += 1
        return self._block[self._used - 1]

    def settle(self) -> None:
        """Use up what was handed out."""
        for draw in self._draws:
            draw.skip(self._used)
        self._draws, self._used = [], 0


def choose(logits: Tensor, uniforms: Tensor | None, temperature: float, top_p: float) -> tuple[Tensor, list]:
    """Next tokens from `logits [rows, vocab]`: int64 `[rows]`, and per row (token, log-probability,
    entropy) on the host.

    Log-probability and entropy (nats) are those of `softmax(logits)`. Without `uniforms [rows]` the choice is greedy.
    Otherwise it is the inverse of the cumulative distribution at the uniform number, tokens in the order of their
    probability and, where equal, of their ids (of their ids alone where `top_p` is 1).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    tokens = _tokens(logits, uniforms, temperature, top_p)
    logprobs = logits.log_softmax(-1)
    # A logit of -inf has no share in the entropy.
    finite = logprobs.clamp(min=torch.finfo(logits.dtype).min)
    entropies = -torch.linalg.vecdot(logprobs.exp(), finite)

    def report() -> list:
        # The only wait for the device in a step.
        chosen = logprobs.gather(1, tokens.clamp(min=0).unsqueeze(1)).squeeze(1)
        return torch.stack((tokens.double(), chosen.double(), entropies.double()), 1).tolist()

    rows = report()
    if undecided := [i for i, (token, _, _) in enumerate(rows) if token < 0]:
        at = torch.tensor(undecided).to(logits.device)
        tokens[at] = _from_sorted(logits[at], uniforms[at], temperature, top_p)
        rows = report()
    return tokens, rows


def _tokens(logits: Tensor, uniforms: Tensor | None, temperature: float, top_p: float) -> Tensor:
    """Tokens; -1 where the nucleus is larger than the candidates."""
    if uniforms is None:
        return logits.argmax(-1)
    if top_p == 1:
        return _from_all(logits, uniforms, temperature)
    if logits.shape[1] <= _SMALL_VOCABULARY:
        return _from_sorted(logits, uniforms, temperature, top_p)
    return _from_candidates(logits, uniforms, temperature, top_p)


def _from_sorted(logits: Tensor, uniforms: Tensor, temperature: float, top_p: float) -> Tensor:
    values, ids = logits.sort(descending=True, stable=True)
    cumulative = _cumulative(values, values[:, :1], temperature)
    return _invert(cumulative, cumulative[:, -1], ids, uniforms, top_p)[0]


def _from_all(logits: Tensor, uniforms: Tensor, temperature: float) -> Tensor:
    cumulative = _cumulative(logits, logits.amax(-1, keepdim=True), temperature)
    target = (uniforms * cumulative[:, -1]).unsqueeze(1)
    # Rounding can lift the target to the very end, behind the last token that can be chosen.
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
    return torch.minimum(torch.searchsorted(cumulative, target, right=True), last).squeeze(1)


def _from_candidates(logits: Tensor, uniforms: Tensor, temperature: float, top_p: float) -> Tensor:
    # Ties come out of topk in any order: by id first, then by value.
    ids = logits.topk(CANDIDATES, sorted=False).indices.sort().values
    values, order = logits.gather(1, ids).sort(descending=True, stable=True)
    highest = values[:, :1]
    total = _weights(logits, highest, temperature).sum(-1, dtype=torch.float64)
    cumulative = _cumulative(values, highest, temperature)
    tokens, size = _invert(cumulative, total, ids.gather(1, order), uniforms, top_p)
    # Of tokens as probable as the last candidate, others may have been left out.
    certain = (values > values[:, -1:]).sum(-1)
    return tokens.where(size <= certain, -1)


def _weights(logits: Tensor, highest: Tensor, temperature: float) -> Tensor:
    return ((logits - highest) / temperature).exp_()


def _cumulative(logits: Tensor, highest: Tensor, temperature: float) -> Tensor:
    """Running sum of the unnormalised probabilities; in float64, so that it keeps apart what a uniform number can."""
    return _weights(logits, highest, temperature).cumsum(-1, dtype=torch.float64)


def _invert(cumulative: Tensor, total: Tensor, ids: Tensor, uniforms: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Tokens, and the nuclei's sizes (one beyond the candidates: not all of the nucleus is there)."""
    last = cumulative.shape[1] - 1
    size = (cumulative < (top_p * total).unsqueeze(1)).sum(-1) + 1
    end = (size - 1).clamp(max=last)
    mass = cumulative.gather(1, end.unsqueeze(1)).squeeze(1)
    at = torch.minimum((cumulative <= (uniforms * mass).unsqueeze(1)).sum(-1), end)
    return ids.gather(1, at.unsqueeze(1)).squeeze(1), size
