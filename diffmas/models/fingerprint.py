"""What a model is made of: where that is the same, what was found of it still holds."""

from __future__ import annotations

import hashlib
from typing import Any

from transformers import PreTrainedModel

from diffmas.models.dropout import DROPPING
from diffmas.models.in_place import own_class, replaced_by_others
from diffmas.models.rotation import rotary_buffers


def made_of(model: PreTrainedModel) -> str:
    """A digest of its configuration, its modules' classes and forwards, and its frequencies; not of its weights."""
    modules = [
        (name, own_class(module).__module__, own_class(module).__qualname__, replaced_by_others(module))
        for name, module in model.named_modules()
    ]
    frequencies = [
        (path, name, None if buffer.is_meta else buffer.tolist()) for path, _, name, buffer in rotary_buffers(model)
    ]
    described = repr([lasting(model.config.to_dict()), modules, frequencies])
    return hashlib.sha256(described.encode()).hexdigest()


def lasting(config: Any) -> Any:
    """Without what a system sets itself: how the model attends, and that it drops nothing."""
    if not isinstance(config, dict):
        return config
    own = {k: v for k, v in config.items() if "attn_implementation" not in str(k) and not DROPPING.search(str(k))}
    return {k: lasting(v) for k, v in own.items()}
