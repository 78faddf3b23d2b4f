"""Systems from settings, and from the folder of a run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch import nn
from transformers import PreTrainedTokenizerBase

from diffmas.agents.room import check_adapter
from diffmas.agents.topology import Topology
from diffmas.models.adapters import put_on
from diffmas.models.lora import more_than_linear
from diffmas.runs.description import known, read_description
from diffmas.runs.models import load_bases
from diffmas.runs.settings import SystemArguments
from diffmas.support.progress import announced
from diffmas.support.quiet import quiet_loading
from diffmas.system import MultiAgentSystem
from diffmas.tasks import TaskArguments


def build_system(
    args: SystemArguments, topology: Topology | None = None, *, copies: int = 1
) -> tuple[MultiAgentSystem, PreTrainedTokenizerBase]:
    """A fresh system: base models, new LoRA adapters, topology (default: the one `args` name).

    `copies` of the adapter's weights have to fit: a training keeps gradients and the optimizer's moments beside them.
    """
    topology = topology or args.load_topology()
    if args.lora_r < 1:
        raise ValueError(f"lora_r is {args.lora_r}; allowed: integers ≥ 1")
    models, tokenizers = load_bases(args, topology)
    for name, model in models.items():
        adapters = topology.adapters_on(name)
        check_adapter(model, args.lora_r, args.lora_target_modules, copies * len(adapters))
        with quiet_loading():
            models[name] = put_on(model, _lora(args, model), adapters, topology.adapter_paths)
    with announced("setting up the system"):
        system = MultiAgentSystem.of(models, topology, args, tokenizer=tokenizers)
    return system, tokenizers[topology.model_names[0]]


def _lora(args: SystemArguments, model: nn.Module) -> LoraConfig:
    targets = args.lora_target_modules
    return LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        use_rslora=args.use_rslora,
        target_modules=targets if targets == "all-linear" else targets.split(","),
        exclude_modules=[name for name, module in model.named_modules() if more_than_linear(module)] or None,
        task_type="CAUSAL_LM",
        lora_dropout=0.0,
    )


@dataclass
class Run:
    """A finished or interrupted training, loaded."""

    system: MultiAgentSystem
    tokenizer: PreTrainedTokenizerBase
    args: SystemArguments
    task: TaskArguments
    decoding: dict[str, Any]
    #: Fingerprints of the items it was trained and evaluated on; empty for a run that did not write them.
    data: dict[str, str]


def load_run(folder: str | Path, model_name_or_path: str | None = None, gguf_file: str | None = None) -> Run:
    """The system a run's folder describes, with its trained weights; on another place of its base, where given.

    Raises:
        FileNotFoundError: a folder without `system.json` or without an adapter. ValueError: one that cannot be read.
    """
    if not Path(folder).is_dir():
        # A run is a folder: nothing is looked for on the hub.
        read_description(folder)
    system = MultiAgentSystem.from_pretrained(folder, model_name_or_path=model_name_or_path, gguf_file=gguf_file)
    description = system.description
    args, task = known(SystemArguments, description["system"]), known(TaskArguments, description["task"])
    if model_name_or_path is not None and model_name_or_path != args.model_name_or_path:
        print(f"model_name_or_path is {model_name_or_path!r}; the run had {args.model_name_or_path!r}")
        args = replace(args, model_name_or_path=model_name_or_path, gguf_file=gguf_file)
    return Run(system, system.tokenizer, args, task, description["decoding"], description.get("data", {}))
