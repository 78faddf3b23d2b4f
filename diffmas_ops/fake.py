"""Shapes and dtypes of what the compiled operators return, for fake tensors, `torch.compile` and export.

Imported once the library that defines the operators is loaded.
"""

import torch
from torch import Tensor

from diffmas_ops.decoder_layer import checks
from diffmas_ops.dtypes import accumulation_dtype
from diffmas_ops.layer import (
    DOWN,
    GATE,
    UP,
    BackwardInput,
    BackwardOutput,
    Forward,
    K,
    O,
    Parameters,
    Q,
    V,
)  # fmt: skip


def register_fake(name: str):
    """Like torch's, but leaves out an operator that a library built from older sources does not define."""
    if hasattr(torch.ops.diffmas, name.partition("::")[2]):
        return torch.library.register_fake(name)
    return lambda function: function


def _nothing(*args) -> None:
    return None


for _name in ("kv_append", "kv_concat", "kv_concat_backward", "cached_attention_backward_columns"):
    register_fake(f"diffmas::{_name}")(_nothing)


@register_fake("diffmas::kv_gather")
def _(keys: Tensor, values, q_begin, q_end, starts, max_seqlen_q, max_seqlen_k, total: int, dtype: torch.dtype):
    shape = (total, keys.shape[1], keys.shape[3])
    return keys.new_empty(shape, dtype=dtype), values.new_empty(shape, dtype=dtype)


@register_fake("diffmas::latent_project")
def _(hidden: Tensor, weight, target_norm):
    return hidden.new_empty(hidden.shape), hidden.new_empty(hidden.shape[0], dtype=accumulation_dtype(hidden.dtype))


@register_fake("diffmas::latent_project_backward")
def _(grad_out, hidden: Tensor, weight: Tensor | None, out, norm: Tensor, target_norm, need_weight: bool):
    needed = weight is not None and need_weight
    return hidden.new_empty(hidden.shape), norm.new_empty(weight.shape if needed else 0)


@register_fake("diffmas::expected_embedding")
def _(hidden: Tensor, keys, values: Tensor, *rest):
    lse = hidden.new_empty(hidden.shape[0], dtype=accumulation_dtype(hidden.dtype))
    return hidden.new_empty(hidden.shape[0], values.shape[1]), lse


@register_fake("diffmas::expected_embedding_backward")
def _(grad_out, hidden: Tensor, keys, values, bias, temperature: Tensor, *rest):
    return hidden.new_empty(hidden.shape), temperature.new_empty(1)


@register_fake("diffmas::few_rows_matmul")
def _(x: Tensor, weight: Tensor, transposed: bool):
    return x.new_empty(x.shape[0], weight.shape[0 if transposed else 1])


@register_fake("diffmas::decoder_layer")
def _(*flat):
    given = Forward.of(*flat)
    size = checks.check_forward(given)
    ranks, rows, tokens = size.ranks, size.rows, size.tokens
    heads = (rows, size.queries // size.dim)
    states = (rows * (3 if len(given.parameters.norms) > 4 else 1), size.hidden)
    shapes = [
        (rows, size.hidden), (tokens, size.kv), (rows, size.queries), (*heads, size.dim), heads, states,
        (rows, size.inner), (rows, size.inner), (rows, ranks[Q]), (tokens, ranks[K] + ranks[V]),
        (rows, ranks[O]), (rows, ranks[GATE] + ranks[UP]), (rows, ranks[DOWN]),
    ]  # fmt: skip
    return tuple(given.h.new_empty(shape) for shape in shapes)


def _adapters(parameters: Parameters, chosen):
    a, b = parameters.a, parameters.b
    return [like.new_empty(like.shape) for i in chosen if a[i].shape[0] for like in (a[i], b[i])]


@register_fake("diffmas::decoder_layer_backward_output")
def _(*flat):
    given = BackwardOutput.of(*flat)
    checks.check_backward_output(given)
    likes = (given.grad, given.saved.out, given.saved.out)
    return [like.new_empty(like.shape) for like in likes] + _adapters(given.parameters, (O, GATE, UP, DOWN))


@register_fake("diffmas::decoder_layer_backward_input")
def _(*flat):
    given = BackwardInput.of(*flat)
    checks.check_backward_input(given)
    return [given.h.new_empty(given.h.shape), *_adapters(given.parameters, (Q, K, V))]


@register_fake("diffmas::cached_attention")
def _(q: Tensor, *rest):
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=accumulation_dtype(q.dtype))


@register_fake("diffmas::cached_attention_backward_queries")
def _(grad_out, q: Tensor, out, lse: Tensor, *rest):
    return q.new_empty(q.shape), lse.new_empty(lse.shape)


@register_fake("diffmas::cached_attention_backward")
def _(grad_out, q: Tensor, *rest):
    return q.new_empty(q.shape)


@register_fake("diffmas::cached_attention_backward_token")
def _(grad_out, q: Tensor, out, lse, keys: Tensor, *rest):
    of_keys = (q.shape[0], keys.shape[1], keys.shape[3])
    return q.new_empty(q.shape), q.new_empty(of_keys), q.new_empty(of_keys)


@register_fake("diffmas::merge_states")
def _(outs: Tensor, lses: Tensor):
    return outs.new_empty(outs.shape[1:]), lses.new_empty(lses.shape[1:])
