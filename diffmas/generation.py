"""Decoding from a trace: ragged rows, no padding; a finished row leaves the batch's calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffmas.system import Lengths, MultiAgentSystem, last_tokens
from diffmas_ops import KVTrace


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen: greedy at temperature 0, otherwise sampled from the top-p nucleus."""

    max_new_tokens: int = 2048
    temperature: float = 0.6
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; allowed: integers ≥ 1")
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}; allowed: ≥ 0 (0 is greedy)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; allowed: 0 < top_p ≤ 1")


@torch.no_grad()
def generate(
    system: MultiAgentSystem,
    trace: KVTrace,
    prompt_ids: Tensor,
    prompt_lengths: Lengths,
    decoding: Decoding,
    stop_ids: Sequence[int],
) -> list[list[int]]:
    """The last agent reads its prompt behind `trace` and writes until a stop token or `max_new_tokens`.

    Args:
        trace: from :meth:`MultiAgentSystem.communicate` with `reserve=None`, so that it can grow.
        prompt_ids, prompt_lengths: the last agent's packed prompts, int64 `[tokens]`, and the rows' lengths.
        stop_ids: token ids that end a row; they are not part of the result.

    Returns:
        Token ids, one list per row. A row's samples depend on `decoding.seed` and its place in the batch.
    """
    device = prompt_ids.device
    head = system.language_model.get_output_embeddings()
    generator = torch.Generator(device).manual_seed(decoding.seed)
    hidden = system.read(trace, prompt_lengths, input_ids=prompt_ids)[last_tokens(prompt_lengths).to(device)]
    rows: list[list[int]] = [[] for _ in prompt_lengths]
    active = list(range(len(rows)))
    stops = set(stop_ids)
    for step in range(decoding.max_new_tokens):
        tokens = choose(head(hidden), decoding, generator)
        keep = []
        for i, (row, token) in enumerate(zip(active, tokens.tolist(), strict=True)):
            if token not in stops:
                rows[row].append(token)
                keep.append(i)
        active = [active[i] for i in keep]
        if not active or step + 1 == decoding.max_new_tokens:
            break
        lengths = [0] * len(rows)
        for row in active:
            lengths[row] = 1
        hidden = system.read(trace, lengths, input_ids=tokens[keep])
    return rows


def choose(logits: Tensor, decoding: Decoding, generator: torch.Generator) -> Tensor:
    """Next token ids `[rows]` from `logits [rows, vocab]`."""
    if decoding.temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits.float() / decoding.temperature).softmax(-1)
    ordered, order = probabilities.sort(descending=True, dim=-1)
    # The nucleus keeps the token that crosses top_p.
    ordered[ordered.cumsum(-1) - ordered >= decoding.top_p] = 0
    return order.gather(1, torch.multinomial(ordered, 1, generator=generator)).squeeze(1)
