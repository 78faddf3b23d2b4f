"""The attention kernels of other libraries behind one signature, imported only when used.

Tensors are `[batch, heads, tokens, head_dim]` (keys and values with their own heads), `lse [batch, heads, tokens]` in
natural log. With `causal`, engines marked `aligned_to_end` let the last query see the last column; the others are
given as many columns as queries. Those that serve a window are aligned, causal or not.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from diffmas_ops.errors import UnsupportedError
from diffmas_ops.need import Need

#: Environment variable that insists on one of `ENGINES` instead of the first of `_preference` that can serve.
VARIABLE = "DIFFMAS_FLASH_ENGINE"

_aten = torch.ops.aten


class How(NamedTuple):
    """How an engine makes scores. `left`: the last query sees so many columns before the last column; -1: all."""

    scale: float
    causal: bool
    left: int = -1
    softcap: float = 0.0

    @property
    def window(self) -> tuple[int, int]:
        """Columns to the left and to the right of a query's own, -1: all."""
        return self.left, 0 if self.causal else -1


class Engine(NamedTuple):
    """`forward(q, k, v, how) -> out, lse`, `backward(grad, q, k, v, out, lse, how) -> dq, dk, dv`.

    `serves`: which of `Scores.asked` it has. `module` is what the package `install` provides; `lowest` and `highest`
    bound the compute capability, `head_dim` what it takes of one.
    """

    forward: Callable
    backward: Callable
    aligned_to_end: bool
    module: str | None = None
    install: str = ""
    lowest: tuple[int, int] = (8, 0)
    highest: tuple[int, int] = (99, 0)
    head_dim: int = 256
    serves: tuple[str, ...] = ()

    def refusal(self, like: Tensor, asked: tuple[str, ...] = ()) -> str | None:
        """Why it cannot run on tensors like `[..., head_dim]` with what `asked` names, or None where it can."""
        if lacking := [name for name in asked if name not in self.serves]:
            return f"it has no {' and no '.join(lacking)}"
        return self.machine_refusal(like)

    def machine_refusal(self, like: Tensor) -> str | None:
        """The same of the tensors alone."""
        if not like.is_cuda:
            return f"it runs on GPUs only, not on {like.device.type} tensors"
        if self.module is not None and not _importable(self.module):
            return f"it is not installed ({self.install})"
        if like.dtype not in (torch.float16, torch.bfloat16):
            return f"it has no {like.dtype} kernels, only float16 and bfloat16"
        if not self.lowest <= (capability := torch.cuda.get_device_capability(like.device)) <= self.highest:
            return f"it has no kernels for compute capability {capability[0]}.{capability[1]}"
        if like.shape[-1] > self.head_dim or like.shape[-1] % 8:
            return f"it takes head dims that are multiples of 8 up to {self.head_dim}, not {like.shape[-1]}"
        return None


class _Cpu(Engine):
    def machine_refusal(self, like: Tensor) -> str | None:
        return f"it runs on CPU tensors only, not on {like.device.type}" if like.device.type != "cpu" else None


def choose(like: Tensor, asked: tuple[str, ...] = ()) -> Engine:
    """The engine for tensors like `[..., head_dim]` and `Scores.asked`.

    Raises `UnsupportedError` with every refusal where there is none.
    """
    if (name := os.environ.get(VARIABLE)) is not None and name not in ENGINES:
        raise UnsupportedError(f"{VARIABLE} is {name!r}; allowed: {', '.join(ENGINES)}")
    refusals = []
    for candidate in [name] if name is not None else _preference(like):
        if (reason := ENGINES[candidate].refusal(like, asked)) is None:
            return ENGINES[candidate]
        refusals.append(f"{candidate}: {reason}")
    raise UnsupportedError("no flash-attention engine can serve; " + "; ".join(refusals))


def refusal(need: Need) -> str | None:
    """Why no engine can serve, or None where one can."""
    try:
        choose(torch.empty(1, 64, dtype=need.dtype, device=need.device), need.asked)
    except UnsupportedError as error:
        return str(error)
    return None


def functions(operator: str) -> ModuleType:
    return importlib.import_module(f"diffmas_ops.{operator}.flash")


def _preference(like: Tensor) -> tuple[str, ...]:
    if not like.is_cuda:
        return ("cpu",)
    if torch.cuda.get_device_capability(like.device) >= (9, 0):
        return ("flash-attn-3", "flash-attn-4", "cudnn", "flash-attn-2", "torch")
    return ("flash-attn-2", "torch", "cudnn")


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _swap(*tensors: Tensor) -> list[Tensor]:
    """`[batch, heads, tokens, head_dim]` to the packages' `[batch, tokens, heads, head_dim]`, or back."""
    return [x.transpose(1, 2) for x in tensors]


def _fa2_forward(q, k, v, how):
    from flash_attn.flash_attn_interface import flash_attn_func

    with torch.no_grad():
        out, lse, _ = flash_attn_func(
            *_swap(q, k, v), softmax_scale=how.scale, causal=how.causal, window_size=how.window, softcap=how.softcap,
            return_attn_probs=True,
        )  # fmt: skip
    return out.transpose(1, 2), lse


def _fa2_backward(grad, q, k, v, out, lse, how):
    from flash_attn.flash_attn_interface import _flash_attn_backward

    inputs = _swap(grad, q, k, v, out)
    grads = [x.new_empty(x.shape) for x in inputs[1:4]]
    _flash_attn_backward(
        *inputs, lse, *grads, dropout_p=0.0, softmax_scale=how.scale, causal=how.causal,
        window_size_left=how.window[0], window_size_right=how.window[1], softcap=how.softcap, alibi_slopes=None,
        deterministic=True,
    )  # fmt: skip
    return _swap(*grads)


def _fa3_forward(q, k, v, how):
    from flash_attn_interface import flash_attn_func

    with torch.no_grad():
        out, lse = flash_attn_func(
            *_swap(q, k, v), softmax_scale=how.scale, causal=how.causal, window_size=how.window, softcap=how.softcap,
            return_attn_probs=True,
        )  # fmt: skip
    return out.transpose(1, 2), lse


def _fa3_backward(grad, q, k, v, out, lse, how):
    from flash_attn_interface import _flash_attn_backward

    inputs = _swap(grad, q, k, v, out)
    grads = [x.new_empty(x.shape) for x in inputs[1:4]]
    window = dict(zip(("window_size_left", "window_size_right"), how.window, strict=True))
    if "window_size" in inspect.signature(_flash_attn_backward).parameters:
        window = dict(window_size=how.window)
    # By position: the name of `causal` has changed between releases. The Nones are variable-length arguments.
    _flash_attn_backward(
        *inputs, lse, *[None] * 6, *grads, how.scale, how.causal, **window, softcap=how.softcap, deterministic=True
    )
    return _swap(*grads)


def _fa4_forward(q, k, v, how):
    from flash_attn.cute.interface import flash_attn_func

    with torch.no_grad():
        out, lse = flash_attn_func(*_swap(q, k, v), softmax_scale=how.scale, causal=how.causal, return_lse=True)[:2]
    return out.transpose(1, 2), lse


def _fa4_backward(grad, q, k, v, out, lse, how):
    from flash_attn.cute.interface import _flash_attn_bwd

    grad, q, k, v, out = _swap(grad, q, k, v, out)
    return _swap(*_flash_attn_bwd(q, k, v, out, grad, lse, how.scale, how.causal, deterministic=True)[:3])


def _torch_forward(q, k, v, how):
    return _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, how.causal, scale=how.scale)[:2]


def _torch_backward(grad, q, k, v, out, lse, how):
    unused = torch.zeros(2, dtype=torch.int64, device=q.device)  # the state of a dropout that is not there
    return _aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, how.causal, unused, unused, scale=how.scale
    )


def _cudnn_forward(q, k, v, how):
    out, lse = _aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, how.causal, scale=how.scale)[:2]
    return out, lse.view(out.shape[:3])


def _cudnn_backward(grad, q, k, v, out, lse, how):
    unused = torch.zeros((), dtype=torch.int64, device=q.device)
    return _aten._scaled_dot_product_cudnn_attention_backward(
        grad, q, k, v, out, lse.unsqueeze(-1), unused, unused, None, None, None, q.shape[2], k.shape[2], 0.0,
        how.causal, scale=how.scale,
    )  # fmt: skip


def _cpu_forward(q, k, v, how):
    return _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, how.causal, scale=how.scale)


def _cpu_backward(grad, q, k, v, out, lse, how):
    return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, how.causal, scale=how.scale
    )


ENGINES = {
    "flash-attn-2": Engine(
        _fa2_forward, _fa2_backward, True, "flash_attn.flash_attn_interface", "pip install flash-attn>=2.7",
        serves=("window", "softcap"),
    ),
    "flash-attn-3": Engine(
        _fa3_forward, _fa3_backward, True, "flash_attn_interface",
        "build it from the folder hopper of github.com/Dao-AILab/flash-attention", (9, 0), (9, 0),
        serves=("window", "softcap"),
    ),
    "flash-attn-4": Engine(
        _fa4_forward, _fa4_backward, True, "flash_attn.cute.interface", "pip install flash-attn-4", (9, 0),
    ),
    "cudnn": Engine(_cudnn_forward, _cudnn_backward, False, head_dim=128),
    "torch": Engine(_torch_forward, _torch_backward, True),
    "cpu": _Cpu(_cpu_forward, _cpu_backward, False),
}  # fmt: skip
