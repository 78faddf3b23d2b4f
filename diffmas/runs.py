"""A run's folder: the PEFT adapter, a learned alignment and `system.json`, from which the system is built again."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase

from diffmas.card import write_card
from diffmas.distributed import is_sharded, like, process, whole
from diffmas.embedded import EMBEDDED_PATH
from diffmas.loss import LOSSES
from diffmas.progress import announced
from diffmas.quiet import quiet_loading
from diffmas.system import MultiAgentSystem
from diffmas.tasks import TaskArguments
from diffmas.topology import Topology, load_topology

SYSTEM_FILE, ALIGNMENT_FILE, ADAPTER_FILE = "system.json", "alignment.safetensors", "adapter_model.safetensors"
QUANTIZATIONS = ("none", "4bit")
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


@dataclass
class SystemArguments:
    """The model and the agents on it."""

    model: str | None = field(
        default=None, metadata={"help": "Hub id or folder of a causal language model; default: the embedded base."}
    )
    dtype: str = field(default="auto", metadata={"help": f"Of the base model's weights: {', '.join(DTYPES)}."})
    quantization: str = field(
        default="none", metadata={"help": f"Of the base model's weights: {', '.join(QUANTIZATIONS)} (bitsandbytes)."}
    )
    random_weights: bool = field(
        default=False, metadata={"help": "Take only the model's configuration and tokenizer (for tests and timing)."}
    )
    topology: str = field(
        default="sequential",
        metadata={"help": "sequential, hierarchical, stitch, relay, single, or the path of a .yaml file."},
    )
    handover: str | None = field(
        default=None, metadata={"help": "What receivers attend to: full or latent; default: the topology's own."}
    )
    latent_steps: int = field(default=10, metadata={"help": "Latent steps m of every agent but the last."})
    alignment: str = field(default="identity", metadata={"help": "identity, ridge or learned."})
    alignment_initial: str = field(
        default="identity", metadata={"help": "What a learned alignment starts at: identity or ridge."}
    )
    detach_trace: bool = field(default=False, metadata={"help": "Cut the gradient at every hand-over."})
    latent_backward: str = field(
        default="exact",
        metadata={"help": "Gradient of latent runs: exact, or sweeps:k, k parallel backward passes (exact for k = m)."},
    )
    capture: str = field(
        default="off",
        metadata={
            "help": "Latent runs as CUDA graphs: off, or auto (where they can be captured; not yet run on a GPU)."
        },
    )
    checkpointing: str = field(
        default="none",
        metadata={
            "help": "Calls whose activations the backward recomputes: none, prefill, all, or auto (what memory needs)."
        },
    )
    lora_rank: int = field(default=8, metadata={"help": "Rank of the LoRA adapter."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale of the LoRA adapter."})
    lora_targets: str = field(
        default="all-linear", metadata={"help": "Modules to adapt: all-linear, or names separated by commas."}
    )
    implementation: str = field(
        default="auto", metadata={"help": "Operators: auto, or one implementation to insist on."}
    )
    loss: str = field(
        default="auto", metadata={"help": f"How training takes the loss: {', '.join(LOSSES)}; see docs/training.md."}
    )


def load_base(args: SystemArguments) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """The base model and its tokenizer.

    Raises:
        ValueError: an unknown dtype or quantization. OSError: a model that cannot be found.
        ModuleNotFoundError: a quantization without bitsandbytes.
    """
    if args.dtype not in DTYPES:
        raise ValueError(f"dtype is {args.dtype!r}; allowed: {', '.join(DTYPES)}")
    source = args.model or EMBEDDED_PATH
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    if args.quantization != "none":
        return _load_quantized(args, source, torch.bfloat16 if dtype == "auto" else dtype)
    tokenizer = AutoTokenizer.from_pretrained(source)
    if args.random_weights:
        from transformers import AutoConfig

        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
        model = model if dtype == "auto" else model.to(dtype)
    else:
        with quiet_loading():
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    return model, tokenizer


def _load_quantized(args, source, dtype) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """Linear layers in 4 bits (NF4, QLoRA, arXiv 2305.14314); what they compute in, and all else, is `dtype`."""
    if args.quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization is {args.quantization!r}; allowed: {', '.join(QUANTIZATIONS)}")
    if args.random_weights:
        raise ValueError(f"quantization is {args.quantization!r} with random_weights; allowed: none")
    if find_spec("bitsandbytes") is None:
        raise ModuleNotFoundError("quantization is '4bit', which needs bitsandbytes: pip install bitsandbytes")
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    device = {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}
    with quiet_loading():
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, quantization_config=config, device_map=device)
    return model, AutoTokenizer.from_pretrained(source)


def build_system(
    args: SystemArguments, topology: Topology | None = None
) -> tuple[MultiAgentSystem, PreTrainedTokenizerBase]:
    """A fresh system: base model, new LoRA adapter, topology (default: the one `args` name)."""
    topology = topology or load_topology(args.topology, args.handover)
    if args.lora_rank < 1:
        raise ValueError(f"lora_rank is {args.lora_rank}; allowed: integers ≥ 1")
    with announced(f"loading {args.model or 'the embedded base'}"):
        model, tokenizer = load_base(args)
    targets = args.lora_targets if args.lora_targets == "all-linear" else args.lora_targets.split(",")
    lora = LoraConfig(
        r=args.lora_rank, lora_alpha=args.lora_alpha, target_modules=targets, task_type="CAUSAL_LM", lora_dropout=0.0
    )
    with quiet_loading():
        adapted = get_peft_model(model, lora)
    with announced("setting up the system"):
        return _assemble(adapted, topology, args), tokenizer


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
        capture=args.capture,
        implementation=args.implementation,
        loss=args.loss,
    )


def save_weights(system: MultiAgentSystem, folder: str | Path) -> None:
    """Write what training changes: the adapter, as stock PEFT loads it, and a learned alignment.

    Of several processes the first writes; all of them have to call this, since sharded weights are gathered.
    """
    folder, first = Path(folder), process() == 0
    trained = None
    if is_sharded(system):
        trained = {n: whole(p.detach()).cpu() for n, p in system.model.named_parameters() if p.requires_grad}
    system.model.save_pretrained(folder, state_dict=trained, is_main_process=first)
    if first:
        # Of a checkpoint, the description is in the run's folder.
        described = (path for path in (folder / SYSTEM_FILE, folder.parent / SYSTEM_FILE) if path.is_file())
        write_card(system, folder, next(described, None))
    if system.alignment.kind == "learned":
        weight = whole(system.alignment.weight.detach())
        if first:
            save_file({"weight": weight.cpu().contiguous()}, folder / ALIGNMENT_FILE)


def load_weights(system: MultiAgentSystem, folder: str | Path) -> None:
    """Read what :func:`save_weights` wrote into `system`."""
    folder = Path(folder)
    if not (folder / ADAPTER_FILE).is_file():
        raise FileNotFoundError(f"checkpoint {folder} has no {ADAPTER_FILE}")
    if is_sharded(system):
        adapter = {n.replace(".default", ""): p for n, p in system.model.named_parameters() if p.requires_grad}
        for name, value in load_file(folder / ADAPTER_FILE).items():
            _copy(value, adapter[name])
    else:
        with quiet_loading():
            system.model.load_adapter(str(folder), "default", is_trainable=True)
    if system.alignment.kind == "learned":
        _copy(load_file(folder / ALIGNMENT_FILE)["weight"], system.alignment.weight)


@torch.no_grad()
def _copy(value: torch.Tensor, parameter: torch.Tensor) -> None:
    parameter.copy_(like(value, parameter))


def describe(
    system: MultiAgentSystem, args: SystemArguments, task: TaskArguments, decoding: dict[str, Any]
) -> dict[str, Any]:
    """What `system.json` holds: everything but the weights that :func:`load_run` needs."""
    return {
        "system": asdict(args),
        "topology": system.topology.to_dict(),
        "task": asdict(task),
        "decoding": decoding,
    }


@dataclass
class Run:
    """A finished or interrupted training, loaded."""

    system: MultiAgentSystem
    tokenizer: PreTrainedTokenizerBase
    args: SystemArguments
    task: TaskArguments
    decoding: dict[str, Any]


def load_run(folder: str | Path) -> Run:
    """The system a run's folder describes, with its trained weights.

    Raises:
        FileNotFoundError: a folder without `system.json` or without an adapter.
    """
    folder = Path(folder)
    if not (folder / SYSTEM_FILE).is_file():
        raise FileNotFoundError(f"run {folder} has no {SYSTEM_FILE}; allowed: a folder written by diffmas.train")
    description = json.loads((folder / SYSTEM_FILE).read_text())
    args = _known(SystemArguments, description["system"])
    if not (folder / ADAPTER_FILE).is_file():
        raise FileNotFoundError(f"run {folder} has no {ADAPTER_FILE}; allowed: a run whose training has finished")
    with announced(f"loading {args.model or 'the embedded base'}"):
        model, tokenizer = load_base(args)
    with quiet_loading():
        adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    with announced("setting up the system"):
        system = _assemble(adapted, Topology.from_dict(description["topology"]), args)
    if system.alignment.kind == "learned":
        _copy(load_file(folder / ALIGNMENT_FILE)["weight"], system.alignment.weight)
    return Run(system, tokenizer, args, _known(TaskArguments, description["task"]), description["decoding"])


def _known(kind: type, values: dict[str, Any]) -> Any:
    names = {f.name for f in fields(kind)}
    return kind(**{k: v for k, v in values.items() if k in names})
