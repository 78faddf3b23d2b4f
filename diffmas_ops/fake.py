"""Shapes and dtypes of what the compiled operators return, for fake tensors, `torch.compile` and export.

Imported once the library that defines the operators is loaded.
"""

import torch
from torch import Tensor

from diffmas_ops.decoder_layer import checks
from diffmas_ops.dtypes import accumulation_dtype


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


@register_fake("diffmas::few_rows_matmul")
def _(x: Tensor, weight: Tensor, transposed: bool):
    return x.new_empty(x.shape[0], weight.shape[0 if transposed else 1])


@register_fake("diffmas::decoder_layer")
def _(h: Tensor, *rest):
    # All but the scale.
    size = checks.check_forward(h, *rest[:-1])
    ranks, rows, tokens = size.ranks, size.rows, size.tokens
    heads = (rows, size.queries // size.dim)
    shapes = [
        (rows, size.hidden), (tokens, size.kv), (rows, size.queries), (*heads, size.dim), heads, (rows, size.hidden),
        (rows, size.inner), (rows, size.inner), (rows, ranks[0]), (tokens, ranks[1] + ranks[2]), (rows, ranks[3]),
        (rows, ranks[4] + ranks[5]), (rows, ranks[6]),
    ]  # fmt: skip
    return tuple(h.new_empty(shape) for shape in shapes)


def _adapters(a, b, chosen):
    return [like.new_empty(like.shape) for i in chosen if a[i].shape[0] for like in (a[i], b[i])]


@register_fake("diffmas::decoder_layer_backward_output")
def _(grad, cos, sin, q, out, middle, gate, up, low_o, low_gate_up, low_down, norms, epsilon, weights, biases, a, b,
      *rest):  # fmt: skip
    checks.check_backward_output(
        grad, cos, sin, q, out, middle, gate, up, low_o, low_gate_up, low_down, norms, epsilon, weights, biases, a, b,
        *rest,
    )  # fmt: skip
    likes = (grad, out, out)
    return [like.new_empty(like.shape) for like in likes] + _adapters(a, b, (3, 4, 5, 6))


@register_fake("diffmas::decoder_layer_backward_input")
def _(grad_q, grad_k, grad_v, grad_middle, h, cos, sin, k, q, low_q, low_kv, norms, epsilon, weights, biases, a, b,
      *rest):  # fmt: skip
    checks.check_backward_input(
        grad_q, grad_k, grad_v, grad_middle, h, cos, sin, k, q, low_q, low_kv, norms, epsilon, weights, biases, a, b,
        *rest,
    )  # fmt: skip
    return [h.new_empty(h.shape), *_adapters(a, b, (0, 1, 2))]


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
