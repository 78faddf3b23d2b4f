"""The weights that another engine decodes with: a base model and the last agent's adapter, as folders it can load."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from transformers import PreTrainedTokenizerBase

from diffmas.models.adapters import CONFIG_FILE, NONE, WEIGHTS_FILE, adapted_modules
from diffmas.models.fingerprint import lasting
from diffmas.support.failures import writing
from diffmas.support.progress import announced
from diffmas.system import MultiAgentSystem


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter in a folder of its own.

    Attributes:
        name: changes with its content, so that nothing computed with another one is taken for it.
        folder: as stock PEFT writes it. rank: its largest.
        targets: the modules it adapts, by the last part of their names.
    """

    name: str
    folder: str
    rank: int
    targets: tuple[str, ...] = ()


def base_weights(system: MultiAgentSystem) -> dict[str, torch.Tensor]:
    """The language model's weights by the names that it has without PEFT; adapters are no part of them."""
    model = system.agent_model.language_model
    inside = {id(p) for m in adapted_modules(model) if isinstance(m, BaseTunerLayer) for p in _own(m)}
    state = model.state_dict(keep_vars=True)
    return {name.replace(".base_layer.", "."): x.detach() for name, x in state.items() if id(x) not in inside}


def _own(layer: Any) -> list[torch.Tensor]:
    """An adapted layer's parameters but for those of the layer it is around."""
    base = {id(p) for p in layer.get_base_layer().parameters()}
    return [p for p in layer.parameters() if id(p) not in base]


def fingerprint(system: MultiAgentSystem) -> str:
    """Of the base model, bit by bit, and of its configuration: traces are no other model's."""
    model = system.agent_model.language_model
    digest = hashlib.sha256(json.dumps(lasting(model.config.to_dict()), sort_keys=True, default=repr).encode())
    with announced("taking the base model's fingerprint"):
        for name, x in base_weights(system).items():
            digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
            digest.update(x.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def loadable(system: MultiAgentSystem) -> str | None:
    """The folder or hub name that the base model came from, where another engine can load the same from there.

    Only what a run says of its model is known to be so: weights that were changed in Python are still called alike.
    """
    described = system.description.get("system", {})
    model, name = system.agent_model.language_model, described.get("model_name_or_path")
    special = described.get("random_weights") or described.get("quantization", "none") != "none"
    if not name or special or hasattr(model.config, "gguf_source"):
        return None
    return name if type(model).__name__ in (model.config.architectures or ()) else None


def write_base(system: MultiAgentSystem, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> str:
    """Write the base model as it is in memory, and its tokenizer; returns the folder.

    Raises:
        ValueError: one whose weights are quantized, which cannot be written as they are used.
        OSError: a folder that cannot be written to.
    """
    model = system.agent_model.language_model
    if getattr(model, "is_quantized", False):
        raise ValueError(
            "the model's weights are quantized; allowed: a model that is not, or model=…, what the other engine loads"
        )
    with announced("writing the base model"), writing(folder):
        model.save_pretrained(folder, state_dict=base_weights(system))
        tokenizer.save_pretrained(folder)
    return str(folder)


def running_adapter(system: MultiAgentSystem) -> str | None:
    """The adapter that the last agent would run with now; None where it would run without any.

    Raises:
        ValueError: several at once.
    """
    layers = [m for m in adapted_modules(system.agent_model.model) if isinstance(m, BaseTunerLayer)]
    if not layers or layers[0].disable_adapters:
        return None
    if system.topology.names_adapters:
        name = system.topology.adapter_of(system.topology.last)
        return None if name == NONE else name
    if len(active := layers[0].active_adapters) != 1:
        raise ValueError(f"the model has active adapters {active}; allowed: one")
    return active[0]


def write_adapter(system: MultiAgentSystem, name: str, folder: str | Path) -> Adapter:
    """Write adapter `name` into a folder inside `folder`, called like its content."""
    model, config = system.agent_model.model, system.agent_model.model.peft_config[name]
    beside = Path(tempfile.mkdtemp(dir=folder))
    with writing(folder):
        model.save_pretrained(str(beside), selected_adapters=[name])
    found = beside / name if (beside / name).is_dir() else beside
    described = json.loads((found / CONFIG_FILE).read_text())
    # Modules are named in any order.
    described = {k: sorted(v) if isinstance(v, list) else v for k, v in described.items()}
    content = hashlib.sha256((found / WEIGHTS_FILE).read_bytes())
    content.update(json.dumps(described, sort_keys=True).encode())
    with safe_open(found / WEIGHTS_FILE, "pt") as file:
        modules = {key.partition(".lora_")[0].rpartition(".")[2] for key in file.keys() if ".lora_" in key}  # noqa: SIM118
    called = f"{name}-{content.hexdigest()[:16]}"
    if not (place := Path(folder, called)).is_dir():
        found.rename(place)
    shutil.rmtree(beside, ignore_errors=True)
    return Adapter(called, str(place), max([config.r, *config.rank_pattern.values()]), tuple(sorted(modules)))
