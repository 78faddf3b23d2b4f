"""Dropout and router jitter of a base model: none in a trajectory, whose gradients recompute what was read."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from diffmas.models.in_place import own_class

#: What configurations and modules call a probability of dropping, or a width of noise: attention_dropout, embd_pdrop,
#: layerdrop, router_jitter_noise.
DROPPING = re.compile(r"dropout|pdrop|layerdrop|jitter")
#: Routers that sample experts in training, by a number that decides between experts in evaluation too.
_SAMPLING = {"PhimoeTopKRouter": "router_jitter_noise"}


class Silenced(Warning):
    """Training goes without the dropout or the noise that a model's configuration asks for."""


def silence(model: PreTrainedModel) -> dict[str, float]:
    """Set every dropout and jitter of `model` to 0; an adapter's own (`lora_dropout`) stays.

    They take part in training only: what the model computes in evaluation is as before. What decides there too is kept,
    of :func:`sampling_routers`.

    Returns:
        what they were, by their names: those of the configuration, or of modules where it has none.
    """
    config = model.config.get_text_config(decoder=True)
    kept = {_SAMPLING[own_class(router).__name__] for router in sampling_routers(model)}
    found = {name: value for name, value in vars(config).items() if _acts(name, value) and name not in kept}
    for name in found:
        setattr(config, name, 0.0)
    modules = {}
    for path, module in _own_modules(model):
        for name, value in list(vars(module).items()):
            if name in kept:
                continue
            if _acts(name, value) or (isinstance(module, nn.modules.dropout._DropoutNd) and name == "p" and value > 0):
                modules[f"{path}.{name}"] = value
                setattr(module, name, 0.0)
    return found or modules


def sampling_routers(model: nn.Module) -> list[nn.Module]:
    """Routers that sample experts while they train: a trajectory has them choose as in evaluation."""
    return [module for module in model.modules() if own_class(module).__name__ in _SAMPLING]


def warn(found: dict[str, float], routers: Sequence[nn.Module]) -> None:
    """Say what training goes without."""
    if routers:
        name = own_class(routers[0]).__name__
        warnings.warn(f"{name} samples experts in training; here it chooses as in evaluation", Silenced, stacklevel=3)
    if not found:
        return
    listed = ", ".join(f"{name} = {value:g}" for name, value in list(found.items())[:8])
    more = f" and {len(found) - 8} more" if len(found) > 8 else ""
    warnings.warn(f"the model has {listed}{more}; training takes 0 for each", Silenced, stacklevel=3)


def _acts(name: str, value: Any) -> bool:
    return isinstance(value, (int, float)) and value is not True and value > 0 and bool(DROPPING.search(name))


def _own_modules(model: nn.Module, path: str = "") -> list[tuple[str, nn.Module]]:
    """The modules of the base, by their paths: of an adapter's layer, only what it was put around."""
    if isinstance(model, BaseTunerLayer):
        return _own_modules(model.get_base_layer(), path)
    children = [_own_modules(child, f"{path}.{name}".lstrip(".")) for name, child in model.named_children()]
    return [(path, model), *(pair for pairs in children for pair in pairs)]
