"""RMS norms, gated MLPs and rotary embedding as liger-kernel's fused kernels, inside a multi-agent system's model."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

import torch
from torch import nn

#: What is fused unless told otherwise. The loss is not liger's to patch: a system never calls the model's own.
PARTS = {"rope": True, "rms_norm": True, "swiglu": True}


def check_liger(device: torch.device, parts: Mapping[str, bool] | None = None) -> None:
    """Raise what :func:`fuse_liger` would, as far as that is known without the model."""
    if find_spec("liger_kernel") is None:
        raise ModuleNotFoundError("use_liger_kernel is True: it needs `pip install liger-kernel`")
    if device.type != "cuda":
        raise ValueError(f"use_liger_kernel is True on {device.type}; allowed: False, its kernels need cuda")
    if unknown := sorted(set(parts or {}) - set(PARTS)):
        raise ValueError(f"liger_kernel_config has {unknown}; allowed: {', '.join(PARTS)} (the loss is --loss)")


def fuse_liger(model: nn.Module, device: torch.device, parts: Mapping[str, bool] | None = None) -> None:
    """Patch `model`, a transformers model or a PEFT model around one, through transformers' own hook for liger-kernel.

    Norms that :func:`~diffmas.models.norm.fuse_norms` had fused become liger's; LoRA layers stay as they are. The
    rotary embedding is replaced for every model of the family in this process; keys enter a trace after it as before.

    Args:
        device: where the model trains. parts: overrides of :data:`PARTS` (`--liger_kernel_config`).

    Raises:
        ModuleNotFoundError: liger-kernel is not installed.
        ValueError: no CUDA device, a part that is not one of :data:`PARTS`, a family that liger-kernel does not know.
    """
    check_liger(device, parts)
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    from transformers.integrations.liger import apply_liger_kernel

    if (kind := model.config.model_type) not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ValueError(f"use_liger_kernel is True, but liger-kernel has no kernels for models of type {kind!r}")
    apply_liger_kernel(model, {**PARTS, **(parts or {}), "cross_entropy": False, "fused_linear_cross_entropy": False})
