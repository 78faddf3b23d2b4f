"""In what a run computes: the frozen base in its own dtype, everything that is trained or accumulated in float32."""

from __future__ import annotations

import os

import torch
from transformers import TrainingArguments

from diffmas.runs.settings import SystemArguments

_INSTEAD = "allowed: --bf16 True or --dtype bfloat16, which need no loss scaling"


def settle_precision(system: SystemArguments, args: TrainingArguments) -> None:
    """Make `--bf16 True` (and a launcher's `--mixed_precision bf16`) mean a base in bfloat16, without autocast.

    The base is frozen: float32 weights under autocast would be cast again at every latent step, and give nothing.

    Raises:
        ValueError: float16, or a dtype that contradicts `bf16`.
    """
    if args.mixed_precision not in ("no", "bf16"):
        # A launcher's: transformers' own argument is refused as it is read.
        raise ValueError(f"mixed_precision is {args.mixed_precision!r}; {_INSTEAD}")
    if system.dtype == "float16":
        raise ValueError(f"dtype is 'float16', in which gradients vanish; {_INSTEAD}")
    if args.bf16 or args.mixed_precision == "bf16":
        if system.dtype not in ("auto", "bfloat16"):
            raise ValueError(f"bf16 is True and dtype is {system.dtype!r}; allowed: auto, bfloat16")
        system.dtype = "bfloat16"
        args.mixed_precision = os.environ["ACCELERATE_MIXED_PRECISION"] = "no"


def check_base(dtype: torch.dtype) -> None:
    """Raise `ValueError` where `--dtype auto` has found a base in float16."""
    if dtype == torch.float16:
        raise ValueError(f"the model's weights are float16, in which gradients vanish; {_INSTEAD}")
