"""What a user would run instead: attention over concatenated keys and values, eager rotation, a DynamicCache step."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from transformers import DynamicCache

#: `attend(q, keys, values)`: `[B, heads, new, D]` at the end of `[B, kv_heads, columns, D]`.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@lru_cache(maxsize=4)
def _visible(new: int, columns: int) -> Tensor:
    """The mask transformers builds: query i sees the columns up to its own, aligned at the end."""
    return torch.ones(new, columns, dtype=torch.bool).tril(columns - new)


def _sdpa_masked(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    new, columns = q.shape[2], keys.shape[2]
    if 1 < new < columns:
        mask = _visible(new, columns).to(q.device)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)
    return F.scaled_dot_product_attention(q, keys, values, is_causal=new > 1, enable_gqa=True)


def _sdpa_with(backend: SDPBackend) -> Attend:
    def attend(q, keys, values):
        new, columns = q.shape[2], keys.shape[2]
        offset = 1 < new < columns
        mask = causal_lower_right(new, columns) if offset else None
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                q, keys, values, attn_mask=mask, is_causal=new > 1 and not offset, enable_gqa=True
            )

    return attend


def _cudnn(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    # cuDNN takes a bottom-right causal mask from PyTorch only as a tensor.
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _sdpa_masked(q, keys, values)


@lru_cache(maxsize=1)
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@lru_cache(maxsize=8)
def _block_mask(new: int, columns: int, device: str):
    from torch.nn.attention.flex_attention import create_block_mask

    offset = columns - new
    return create_block_mask(lambda b, h, i, j: i + offset >= j, None, None, new, columns, device=device)


def _flex(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    mask = _block_mask(q.shape[2], keys.shape[2], str(q.device))
    return _compiled_flex()(q, keys, values, block_mask=mask, enable_gqa=True)


def _flash_attn(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(*(x.transpose(1, 2) for x in (q, keys, values)), causal=True).transpose(1, 2)


def attention(device: str, *, compiled: bool) -> dict[str, Attend | str]:
    """Attention functions by name, plain PyTorch first, or why one is not there.

    `compiled`: FlexAttention too, which compiles for tens of seconds a size.
    """
    if device == "cpu":
        return {"SDPA": _sdpa_masked}
    peers: dict[str, Attend | str] = {
        "SDPA flash": _sdpa_with(SDPBackend.FLASH_ATTENTION),
        "SDPA cuDNN": _cudnn,
        "SDPA efficient": _sdpa_with(SDPBackend.EFFICIENT_ATTENTION),
        "flash-attn": _flash_attn if importlib.util.find_spec("flash_attn") else "flash_attn is not installed",
    }
    if compiled:
        peers["FlexAttention"] = _flex
    return peers


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotary embedding as transformers writes it; `cos, sin` broadcast against the whole head dim."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def concat(keys: list[Tensor], values: list[Tensor], cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Traces `[L, B, kv_heads, columns, D]` one after the other; all but the first rotated by `cos, sin [n, D]`."""
    turned = [k if i == 0 else rotate(k, cos[i], sin[i]) for i, k in enumerate(keys)]
    return torch.cat(turned, 3), torch.cat(values, 3)


def expect(hidden: Tensor, keys: Tensor, values: Tensor, temperature: float) -> Tensor:
    """The embedding expected of the next token, with all probabilities in memory."""
    logits = hidden @ keys.T
    logits = logits.float() if hidden.dtype.itemsize < 4 else logits
    return (logits / temperature).softmax(-1).to(values.dtype) @ values


def project(hidden: Tensor, weight: Tensor | None, target_norm: float) -> Tensor:
    """Wₐ as an eager product and rescale."""
    y = hidden if weight is None else hidden @ weight
    return target_norm * y / y.norm(dim=-1, keepdim=True)


def exact_attention(q: Tensor, keys: Tensor, values: Tensor, grad: Tensor | None = None) -> tuple[Tensor, ...]:
    """In float64: `out`, or with `grad` the gradients of `q, keys, values`; shapes as for :data:`Attend`.

    Works through rows and blocks of queries, so that long traces fit.
    """
    batch, heads, new, dim = q.shape
    kv_heads, columns = keys.shape[1:3]
    shapes = (q.shape,) if grad is None else (q.shape, keys.shape, values.shape)
    results = tuple(q.new_zeros(shape, dtype=torch.float64) for shape in shapes)
    block = max(1, (1 << 28) // (heads * columns))
    positions = torch.arange(columns - new, columns, device=q.device)
    for row in range(batch):
        k, v = (x[row, :, None].double() for x in (keys, values))
        for begin in range(0, new, block):
            at = slice(begin, min(begin + block, new))
            query = q[row, :, at].double().unflatten(0, (kv_heads, -1)) * dim**-0.5
            hidden = torch.arange(columns, device=q.device) > positions[at, None]
            p = (query @ k.mT).masked_fill_(hidden, -torch.inf).softmax(-1)
            out = p @ v
            if grad is None:
                results[0][row, :, at] = out.flatten(0, 1)
                continue
            g = grad[row, :, at].double().unflatten(0, (kv_heads, -1))
            results[2][row] += (p.mT @ g).sum(1)
            p *= g @ v.mT - (g * out).sum(-1, keepdim=True)
            results[0][row, :, at] = (p @ k).flatten(0, 1) * dim**-0.5
            results[1][row] += (p.mT @ query).sum(1)
    return results


def latent_rollout(decoder, cache: DynamicCache, hidden: Tensor, target_norm: Tensor, latent_steps: int) -> Tensor:
    """Latent steps `hidden [batch, 1, H]` → the last hidden state, as transformers runs them."""
    for _ in range(latent_steps):
        embeds = project(hidden, None, target_norm)
        hidden = decoder(inputs_embeds=embeds, past_key_values=cache, use_cache=True).last_hidden_state
    return hidden


def sequential_loss(model, prompts: list[Tensor], answer: Tensor, latent_steps: int) -> Tensor:
    """Mean answer loss of agents in sequence with full hand-over, as a careful user of transformers writes it.

    Args:
        model: a causal language model whose attention is transformers' own.
        prompts: per agent, int64 `[batch, tokens]`, rows of one length.
        answer: int64 `[batch, tokens]`.
    """
    decoder, embedding = model.get_decoder(), model.get_input_embeddings().weight
    target_norm = embedding.detach().float().norm(dim=-1).mean().to(embedding.dtype)
    cache = DynamicCache()

    def read(**inputs) -> Tensor:
        return decoder(**inputs, past_key_values=cache, use_cache=True).last_hidden_state

    for prompt in prompts[:-1]:
        latent_rollout(decoder, cache, read(input_ids=prompt)[:, -1:], target_norm, latent_steps)
    hidden = read(input_ids=torch.cat((prompts[-1], answer), 1))
    logits = model.get_output_embeddings()(hidden[:, prompts[-1].shape[1] - 1 : -1])
    return F.cross_entropy(logits.float().flatten(0, 1), answer.flatten())
