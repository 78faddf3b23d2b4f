"""What a model is made of: where that is the same, what was found of it still holds."""

from __future__ import annotations

import hashlib
import json

from transformers import PreTrainedModel

from diffmas.models.in_place import own_class, replaced_by_others
from diffmas.models.rotation import rotary_buffers


def made_of(model: PreTrainedModel) -> str:
    """A digest of its configuration, its modules' classes and forwards, and its frequencies; not of its weights."""
    config = {k: v for k, v in model.config.to_dict().items() if "attn_implementation" not in k}
    modules = [
        (name, own_class(module).__module__, own_class(module).__qualname__, replaced_by_others(module))
        for name, module in model.named_modules()
    ]
    frequencies = [(name, buffer.tolist()) for _, name, buffer in rotary_buffers(model)]
    described = json.dumps([config, modules, frequencies], sort_keys=True, default=str)
    return hashlib.sha256(described.encode()).hexdigest()
