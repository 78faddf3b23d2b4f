"""Cross-entropy of the answer from hidden states, without logits of the whole answer in memory."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from diffmas.models.head import Head, more_than_weights

LOSSES = ("auto", "chunked", "liger", "cce", "plain")
#: What a chunk's logits and their log-softmax may take together, in bytes.
CHUNK_BYTES = 128 << 20
_PACKAGES = {"liger": ("liger_kernel", "liger-kernel"), "cce": ("cut_cross_entropy", "cut-cross-entropy")}
_HALF = (torch.bfloat16, torch.float16)
_DTYPES = {"liger": (torch.float32, *_HALF), "cce": _HALF}


class AnswerLoss:
    """Cross-entropy, summed over the answer's tokens, of a language model's head on their hidden states.

    Args:
        kind: "chunked" has the logits of a few tokens at a time, at most :data:`CHUNK_BYTES` of them; "liger" and
            "cce" are the fused kernels of liger-kernel and cut-cross-entropy (CUDA); "plain" takes all logits at
            once. "auto" is liger where it serves, otherwise chunked, and plain for a head that is more than one
            linear layer (adapters, hooks, quantisation, sharding). It never takes cce, which adds up gradients in an
            order that changes from run to run.

    Raises:
        ValueError: an unknown kind. ModuleNotFoundError: a kind whose package is not installed.
    """

    def __init__(self, kind: str = "auto"):
        if kind not in LOSSES:
            raise ValueError(f"loss is {kind!r}; allowed: {', '.join(LOSSES)}")
        if kind in _PACKAGES and not _installed(kind):
            raise ModuleNotFoundError(f"loss is {kind!r}: it needs `pip install {_PACKAGES[kind][1]}`")
        self.kind = kind

    def __call__(self, head: Head, hidden: Tensor, targets: Tensor) -> Tensor:
        """Float32 scalar (float64 for float64 states) of `hidden [tokens, hidden]` and int64 `targets [tokens]`.

        Raises:
            ValueError: the kind asked for cannot serve this head, device or dtype.
        """
        head.check()
        kind = self.kind
        if kind == "auto":
            kind = next(k for k in ("liger", "chunked", "plain") if _obstacle(k, head.linear, hidden) is None)
        elif (why := _obstacle(kind, head.linear, hidden)) is not None:
            raise ValueError(f"loss is {kind!r}, but {why}; allowed: auto, plain")
        return _SERVING[kind](head, hidden, targets)


def plain_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy of `logits [tokens, vocab]`, with the softmax in float32 or wider."""
    return F.cross_entropy(logits.to(_wide(logits.dtype)), targets, reduction="sum")


def token_bytes(vocab: int, dtype: torch.dtype, capped: bool = False) -> int:
    """Of one token in a chunk: its logits in `dtype`, their wider log-softmax, and what a cap needs beside it."""
    return vocab * (dtype.itemsize + (3 if capped else 1) * _wide(dtype).itemsize)


def chunk_tokens(vocab: int, dtype: torch.dtype, capped: bool = False) -> int:
    """Tokens of a chunk, which fits :data:`CHUNK_BYTES`; at least one."""
    return max(1, CHUNK_BYTES // token_bytes(vocab, dtype, capped))


def _obstacle(kind: str, head: nn.Module, hidden: Tensor) -> str | None:
    """Why `kind` cannot serve; None where it can."""
    if kind == "plain":
        return None
    if (why := more_than_weights(head)) is not None:
        return why
    if head.weight.device != hidden.device:
        return f"the model's head is on {head.weight.device}, and the states are on {hidden.device}"
    if kind == "chunked":
        return None
    if not _installed(kind):
        return f"{_PACKAGES[kind][1]} is not installed"
    if not hidden.is_cuda:
        return f"the model is on {hidden.device.type}, not on cuda"
    if (dtype := _dtype(hidden)) not in _DTYPES[kind]:
        return f"the states are {dtype}, not one of {', '.join(map(str, _DTYPES[kind]))}"
    if kind == "cce" and head.bias is not None:
        return "the model's head has a bias"
    return None


def _installed(kind: str) -> bool:
    return find_spec(_PACKAGES[kind][0]) is not None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _dtype(hidden: Tensor) -> torch.dtype:
    """What the head computes in."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _inputs(head: Head, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    # No other kind of layer gets past its obstacle.
    linear, dtype = cast(nn.Linear, head.linear), _dtype(hidden)
    return hidden.to(dtype), linear.weight.to(dtype), None if linear.bias is None else linear.bias.to(dtype)


def _scaled_inputs(head: Head, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """For kernels that know no scale: the same factor on what the head takes."""
    hidden, weight, bias = _inputs(head, hidden)
    if head.scale == 1:
        return hidden, weight, bias
    return hidden * head.scale, weight, None if bias is None else bias * head.scale


def _plain(head: Head, hidden: Tensor, targets: Tensor) -> Tensor:
    return plain_loss(head(hidden), targets)


def _chunked(head: Head, hidden: Tensor, targets: Tensor) -> Tensor:
    inputs = _inputs(head, hidden)
    return _ChunkedCrossEntropy.apply(*inputs, targets, head.scale, head.cap, torch.is_grad_enabled())


def _liger(head: Head, hidden: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    hidden, weight, bias = _scaled_inputs(head, hidden)
    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum", softcap=head.cap, accum_dtype=_wide(hidden.dtype))
    return loss(weight, hidden, targets, bias)


def _cce(head: Head, hidden: Tensor, targets: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    hidden, weight, _ = _scaled_inputs(head, hidden)
    # By default it leaves out gradients it takes for small.
    return linear_cross_entropy(hidden, weight, targets, softcap=head.cap, reduction="sum", filter_eps=None)


_SERVING: dict[str, Callable[[Head, Tensor, Tensor], Tensor]] = {
    "plain": _plain,
    "chunked": _chunked,
    "liger": _liger,
    "cce": _cce,
}


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of `z = scale (hidden Wᵀ + bias)`, or of `cap tanh(z / cap)` where there is a cap.

    All gradients are made in the forward, while a chunk's logits exist. `hidden [tokens, hidden]`,
    `weight [vocab, hidden]` and `bias [vocab]` share a dtype.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, scale, cap, differentiate):
        acc = _wide(hidden.dtype)
        need_hidden, need_weight, need_bias, *_ = (differentiate and need for need in ctx.needs_input_grad)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=acc) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=acc) if need_bias else None
        loss = hidden.new_zeros((), dtype=acc)
        size = chunk_tokens(weight.shape[0], hidden.dtype, cap is not None)
        inner = scale if cap is None else scale / cap
        with torch.autocast(hidden.device.type, enabled=False):
            for begin in range(0, len(targets), size):
                rows, gold = hidden[begin : begin + size], targets[begin : begin + size, None]
                logits = _scaled_linear(rows, weight, bias, inner)
                if cap is None:
                    log_p = logits.log_softmax(-1, dtype=acc)
                else:
                    bent = logits.to(acc).tanh_()
                    log_p = (cap * bent).log_softmax(-1)
                loss -= log_p.gather(1, gold).sum()
                if not (need_hidden or need_weight or need_bias):
                    continue
                # d loss / d logits = softmax - one-hot.
                grad = log_p.exp_().scatter_add_(1, gold, log_p.new_full((), -1.0).expand(gold.shape))
                if cap is not None:
                    grad.mul_(bent.square_().neg_().add_(1.0))
                if need_bias:
                    grad_bias += grad.sum(0)
                grad = grad.to(hidden.dtype)
                if need_hidden:
                    torch.mm(grad, weight, out=grad_hidden[begin : begin + size])
                if need_weight:
                    _add_product(grad_weight, grad.T, rows)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtype, ctx.scale = hidden.dtype, scale
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        # The scale of the logits is one of their gradients' too.
        grad = grad * ctx.scale
        return *(None if g is None else (g * grad).to(ctx.dtype) for g in ctx.saved_tensors), None, None, None, None


def _scaled_linear(x: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """`scale (x Wᵀ + bias)`, in one product."""
    if scale == 1:
        return F.linear(x, weight, bias)
    # beta = 0 ignores what is added to.
    beta, bias = (0.0, x.new_empty(1)) if bias is None else (scale, bias)
    return torch.addmm(bias, x, weight.T, beta=beta, alpha=scale)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
