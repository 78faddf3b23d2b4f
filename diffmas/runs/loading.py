"""Systems from settings, and from the folder of a run."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedTokenizerBase

from diffmas.agents.room import check_adapter
from diffmas.agents.topology import Topology, load_topology
from diffmas.models.loading import load_base
from diffmas.runs.description import read_description
from diffmas.runs.files import ADAPTER_FILE
from diffmas.runs.settings import SystemArguments
from diffmas.runs.weights import load_alignment
from diffmas.support.failures import reading
from diffmas.support.progress import announced
from diffmas.support.quiet import quiet_loading
from diffmas.system import MultiAgentSystem
from diffmas.tasks import TaskArguments


def build_system(
    args: SystemArguments, topology: Topology | None = None, *, copies: int = 1
) -> tuple[MultiAgentSystem, PreTrainedTokenizerBase]:
    """A fresh system: base model, new LoRA adapter, topology (default: the one `args` name).

    `copies` of the adapter's weights have to fit: a training keeps gradients and the optimizer's moments beside them.
    """
    topology = topology or load_topology(args.topology, args.handover)
    if args.lora_r < 1:
        raise ValueError(f"lora_r is {args.lora_r}; allowed: integers ≥ 1")
    with announced(f"loading {args.model_name_or_path or 'the embedded base'}"):
        model, tokenizer = _base(args)
    check_adapter(model, args.lora_r, args.lora_target_modules, copies)
    targets = (
        args.lora_target_modules if args.lora_target_modules == "all-linear" else args.lora_target_modules.split(",")
    )
    lora = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        target_modules=targets if targets == "all-linear" else targets.split(","),
        task_type="CAUSAL_LM",
        lora_dropout=0.0,
    )
    with quiet_loading():
        adapted = get_peft_model(model, lora)
    with announced("setting up the system"):
        return _assemble(adapted, topology, args), tokenizer


def _base(args: SystemArguments) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    return load_base(
        args.model_name_or_path,
        dtype=args.dtype,
        quantization=args.quantization,
        random_weights=args.random_weights,
    )


def _assemble(model: torch.nn.Module, topology: Topology, args: SystemArguments) -> MultiAgentSystem:
    return MultiAgentSystem(
        model,
        topology,
        latent_steps=args.latent_steps,
        alignment=args.alignment,
        alignment_initial=args.alignment_initial,
        detach_trace=args.detach_trace,
        latent_backward=args.latent_backward,
        # What auto finds is set before training starts.
        checkpointing="all" if args.checkpointing == "auto" else args.checkpointing,
        cuda_graphs=args.cuda_graphs,
        implementation=args.implementation,
        loss=args.loss,
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


def load_run(folder: str | Path, model_name_or_path: str | None = None) -> Run:
    """The system a run's folder describes, with its trained weights; on another place of its base, where given.

    Raises:
        FileNotFoundError: a folder without `system.json` or without an adapter. ValueError: one that cannot be read.
    """
    folder = Path(folder)
    description = read_description(folder)
    topology = Topology.from_dict(description["topology"])
    args, task = _known(SystemArguments, description["system"]), _known(TaskArguments, description["task"])
    if model_name_or_path is not None and model_name_or_path != args.model_name_or_path:
        print(f"model_name_or_path is {model_name_or_path!r}; the run had {args.model_name_or_path!r}")
        args = replace(args, model_name_or_path=model_name_or_path)
    if not (folder / ADAPTER_FILE).is_file():
        raise FileNotFoundError(f"run {folder} has no {ADAPTER_FILE}; allowed: a run whose training has finished")
    with announced(f"loading {args.model_name_or_path or 'the embedded base'}"):
        model, tokenizer = _base(args)
    with reading(f"the adapter of run {folder}"), quiet_loading():
        adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    with announced("setting up the system"):
        system = _assemble(adapted, topology, args)
    if system.agent_model.alignment.kind == "learned":
        load_alignment(system, folder)
    return Run(system, tokenizer, args, task, description["decoding"], description.get("data", {}))


def _known(kind: type, values: dict[str, Any]) -> Any:
    names = {f.name for f in fields(kind)}
    return kind(**{k: v for k, v in values.items() if k in names})
