"""Independent oracles: every row alone, caches grown by `torch.cat`, nothing of diffmas or diffmas_ops.

`trajectory` runs a plain transformers model with a DynamicCache; `DenseTrace` is a toy attention layer's cache.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache


def rotate(x: Tensor, shift: int | Tensor, inv_freq: Tensor, interleaved: bool = False) -> Tensor:
    """`x [..., D]` turned by `shift · inv_freq`, angles in float64; dims behind the rotary ones stay."""
    angles = torch.as_tensor(shift, dtype=torch.float64).unsqueeze(-1) * inv_freq.double()
    if x.dtype.itemsize < 4:
        return rotate(x.float(), shift, inv_freq, interleaved).to(x.dtype)
    turned, rest = x.split((2 * inv_freq.numel(), x.shape[-1] - 2 * inv_freq.numel()), -1)
    pairs = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    z = torch.complex(*pairs)
    z = z * torch.polar(torch.ones_like(angles), angles).to(z.dtype)
    turned = torch.stack((z.real, z.imag), -1).flatten(-2) if interleaved else torch.cat((z.real, z.imag), -1)
    return torch.cat((turned, rest), -1)


def ancestors(dag: dict[str, tuple[str, ...]], name: str) -> list[str]:
    """All agents whose writing reaches `name`, in the order of `dag` (a topological one)."""
    found: set[str] = set()
    stack = list(dag[name])
    while stack:
        found.add(top := stack.pop())
        stack.extend(dag[top])
    return [n for n in dag if n in found]


def entering(decoder, **inputs) -> Tensor:
    """`[tokens, hidden]`: what the first layer gets."""
    seen: list[Tensor] = []
    hook = decoder.layers[0].register_forward_pre_hook(lambda layer, args: seen.append(args[0][0]))
    with torch.no_grad():
        decoder(**inputs, use_cache=False)
    hook.remove()
    return seen[0]


#: How much a gradient may grow over a soft alignment where nothing is said.
DEFAULT_LIMIT = 1.0


class Soft(NamedTuple):
    """A soft alignment: `top_k` 0: all tokens; `limit`: how much a gradient may grow, relative to what it is of."""

    temperature: float | Tensor = 0.7
    top_k: int = 0
    limit: float | None = None

    def options(self) -> dict:
        """What a system is told of it."""
        return dict(
            alignment="soft", alignment_temperature=self.temperature, alignment_top_k=self.top_k,
            latent_grad_clip=None if self.limit == DEFAULT_LIMIT else self.limit or 0.0,
        )  # fmt: skip

    def __call__(self, causal, **inputs) -> Tensor:
        """`[hidden]`: the embedding expected of the next token, of the model's own logits for it."""
        seen: list[Tensor] = []

        def hold(head, args):
            seen.append(args[0].view_as(args[0]))
            return (seen[0],)

        handle = causal.get_output_embeddings().register_forward_pre_hook(hold)
        scores = causal(**inputs, use_cache=True).logits[0, -1] / self.temperature
        handle.remove()
        if self.top_k:
            scores = scores.masked_fill(scores < scores.topk(self.top_k).values[-1], -torch.inf)
        # Called, an embedding would give the row of a padding token no gradient.
        embedding = causal.get_input_embeddings()
        expected = scores.softmax(-1) @ (embedding.weight * getattr(embedding, "embed_scale", 1.0))
        if self.limit is not None and expected.requires_grad:
            lengths = float(expected.detach().norm()), float(seen[0][0, -1].detach().norm())
            arrived: list[float] = []
            expected.register_hook(lambda g: arrived.append(float(g.norm())))

            def cut(gradient):
                most = self.limit * arrived[0] * lengths[0] / lengths[1]
                return gradient * min(1.0, most / float(gradient.norm())) if gradient.any() else gradient

            seen[0].register_hook(cut)
        return expected


def trajectory(
    model, dag, prompts, answer, *, handover, latent_steps, detach=False, weight=None, soft=None, sink=0,
    turn=lambda name: None,
):  # fmt: skip
    """Logits `[answer tokens, vocab]` of one row.

    Args:
        model: a transformers causal language model, possibly inside PEFT, with a stock attention.
        dag: agent name -> senders, in topological order; the last one answers.
        prompts: agent name -> int64 `[n]`.
        answer: int64 `[n]`.
        weight: Wₐ, or None for the identity; `soft`: instead of either.
        sink: columns of the first agent before a receiver that go in front of a latent hand-over.
        turn: told of an agent before the model reads for it.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = causal.get_decoder()
    tokens = torch.arange(causal.config.vocab_size)[None]
    rho = entering(decoder, input_ids=tokens).norm(dim=1).mean()
    # What the model makes of an input's norm on its way to the layers.
    one = torch.ones(1, 1, causal.config.hidden_size, dtype=causal.dtype)
    rho = rho / (entering(decoder, inputs_embeds=one).norm() / one.norm())
    inv_freq = decoder.rotary_emb.inv_freq
    layers = range(causal.config.num_hidden_layers)
    written: dict[str, tuple[int, int, list[tuple[Tensor, Tensor]]]] = {}
    for name in dag:
        cache, length = DynamicCache(), 0
        turn(name)
        if sink and handover == "latent" and dag[name]:
            length = sink
            for layer, (k, v) in enumerate(written[ancestors(dag, name)[0]][2]):
                k, v = k[:, :, :sink], v[:, :, :sink]
                cache.update(*((k.detach(), v.detach()) if detach else (k, v)), layer)
        for sender in ancestors(dag, name):
            position, prompt, pairs = written[sender]
            skip = 0 if handover == "full" else prompt
            for layer, (k, v) in enumerate(pairs):
                k, v = k[:, :, skip:], v[:, :, skip:]
                k = rotate(k, length - position - skip, inv_freq)
                cache.update(*((k.detach(), v.detach()) if detach else (k, v)), layer)
            length += pairs[0][0].shape[2] - skip

        def read(cache=cache, **inputs):
            return decoder(**inputs, past_key_values=cache, use_cache=True).last_hidden_state[0]

        if name == list(dag)[-1]:
            prompt = prompts[name]
            ids = torch.cat((prompt, answer))[None]
            return causal(input_ids=ids, past_key_values=cache, use_cache=True).logits[0, len(prompt) - 1 : -1]
        if soft is not None:
            inputs = dict(input_ids=prompts[name][None])
            for _ in range(latent_steps):
                inputs = dict(inputs_embeds=soft(causal, **inputs, past_key_values=cache)[None, None])
            read(**inputs)
            pairs = [(cache.layers[i].keys[:, :, length:], cache.layers[i].values[:, :, length:]) for i in layers]
            written[name] = (length, len(prompts[name]), pairs)
            continue
        hidden = read(input_ids=prompts[name][None])[-1]
        for _ in range(latent_steps):
            y = hidden if weight is None else hidden @ weight
            hidden = read(inputs_embeds=(rho * y / y.norm())[None, None])[-1]
        pairs = [(cache.layers[i].keys[:, :, length:], cache.layers[i].values[:, :, length:]) for i in layers]
        written[name] = (length, len(prompts[name]), pairs)


def batch(model, dag, prompts, answers, **options) -> tuple[Tensor, Tensor]:
    """Mean answer loss and packed logits of a batch: `prompts[name][b]`, `answers[b]`."""
    rows = range(len(answers))
    logits = [trajectory(model, dag, {n: p[b] for n, p in prompts.items()}, answers[b], **options) for b in rows]
    packed = torch.cat(logits)
    return F.cross_entropy(packed, torch.cat(answers), reduction="sum") / packed.shape[0], packed


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: int,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    chunk: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """`q [n, Hq, D]` at positions `first…` over all of `k, v [N, Hkv, D]`, column j at position j.

    With a window, over the last `window` columns of those up to its own; with a chunk, over those of its own chunk;
    `sinks [Hq]` are the scores of one more column, without a value.
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[2] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool)
    for i in range(q.shape[0]):
        for j in range(k.shape[0]):
            behind = j > first + i
            far = window is not None and first + i - j >= window
            apart = chunk is not None and j // chunk != (first + i) // chunk
            hidden[i, j] = behind or far or apart
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks[:, None, None].expand(-1, q.shape[0], 1)), -1)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., : k.shape[0]], v)


class DenseTrace:
    """One row's keys and values of every layer, grown by `torch.cat`; the oracle of a KVTrace."""

    def __init__(self, layers: list[tuple[Tensor, Tensor]], **scores):
        self.layers, self.scores = layers, scores

    def __len__(self):
        return self.layers[0][0].shape[0]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.enable_grad():  # A call without gradients must not cut those of older columns.
            keys, values = (torch.cat(pair) for pair in zip(self.layers[layer], (k, v), strict=True))
        self.layers[layer] = (keys, values)
        return attend(q, keys, values, keys.shape[0] - q.shape[0], **self.scores)

    def detach_(self):
        self.layers = [(k.detach(), v.detach()) for k, v in self.layers]
