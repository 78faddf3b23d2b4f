"""A run's folder: the PEFT adapter, a learned alignment and `system.json`, from which the system is built again."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase

from diffmas.agents.room import check_adapter
from diffmas.agents.topology import TOPOLOGIES, Topology, load_topology
from diffmas.embedded import EMBEDDED_PATH
from diffmas.models.loss import LOSSES
from diffmas.models.source import check_source
from diffmas.runs.card import write_card
from diffmas.support.atomic import write_atomically
from diffmas.support.distributed import is_sharded, like, process, whole
from diffmas.support.failures import reading, writing
from diffmas.support.progress import announced
from diffmas.support.quiet import quiet_loading
from diffmas.support.text_file import read_text
from diffmas.support.valid_json import to_json
from diffmas.system import MultiAgentSystem
from diffmas.tasks import Task, TaskArguments
from diffmas.tasks.base import JSONL
from diffmas.tasks.content import fingerprints

#: Files of a run besides its weights: what it was made from, as the run itself keeps it.
PROMPTS_FILE, TOPOLOGY_FILE = "prompts.yaml", "topology.yaml"
#: Part and name of the settings that they stand for.
OWN_FILES = (("task", "prompts", PROMPTS_FILE), ("system", "topology", TOPOLOGY_FILE))
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
    check_source(args.model)
    with reading(f"model {args.model or 'embedded base'}"):
        return _load_base(args, args.model or EMBEDDED_PATH)


def _load_base(args: SystemArguments, source: str) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
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
    args: SystemArguments, topology: Topology | None = None, *, copies: int = 1
) -> tuple[MultiAgentSystem, PreTrainedTokenizerBase]:
    """A fresh system: base model, new LoRA adapter, topology (default: the one `args` name).

    `copies` of the adapter's weights have to fit: a training keeps gradients and the optimizer's moments beside them.
    """
    topology = topology or load_topology(args.topology, args.handover)
    if args.lora_rank < 1:
        raise ValueError(f"lora_rank is {args.lora_rank}; allowed: integers ≥ 1")
    with announced(f"loading {args.model or 'the embedded base'}"):
        model, tokenizer = load_base(args)
    check_adapter(model, args.lora_rank, args.lora_targets, copies)
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
    folder.mkdir(parents=True, exist_ok=True)
    trained = None
    if is_sharded(system):
        trained = {n: whole(p.detach()).cpu() for n, p in system.model.named_parameters() if p.requires_grad}
    weight = whole(system.alignment.weight.detach()) if system.alignment.kind == "learned" else None
    if not first:
        return
    # Beside, and then renamed, the adapter last: where it is, all else is, and nothing is half written.
    beside = folder / ".weights"
    shutil.rmtree(beside, ignore_errors=True)
    with writing(folder / ADAPTER_FILE):
        system.model.save_pretrained(beside, state_dict=trained)
    # Of a checkpoint, the description is in the run's folder, above the one it is written in.
    described = (path / SYSTEM_FILE for path in (folder, *folder.parents[:2]))
    write_card(system, beside, next((path for path in described if path.is_file()), None))
    if weight is not None:
        with writing(folder / ALIGNMENT_FILE):
            save_file({"weight": weight.cpu().contiguous()}, beside / ALIGNMENT_FILE)
    for path in sorted(beside.iterdir(), key=lambda path: path.name == ADAPTER_FILE):
        os.replace(path, folder / path.name)
    beside.rmdir()


def load_weights(system: MultiAgentSystem, folder: str | Path) -> None:
    """Read what :func:`save_weights` wrote into `system`."""
    folder = Path(folder)
    if not (folder / ADAPTER_FILE).is_file():
        raise FileNotFoundError(f"checkpoint {folder} has no {ADAPTER_FILE}")
    with reading(str(folder / ADAPTER_FILE)):
        _load_adapter(system, folder)
    if system.alignment.kind == "learned":
        _load_alignment(system, folder)


def _load_adapter(system: MultiAgentSystem, folder: Path) -> None:
    if is_sharded(system):
        adapter = {n.replace(".default", ""): p for n, p in system.model.named_parameters() if p.requires_grad}
        for name, value in load_file(folder / ADAPTER_FILE).items():
            _copy(value, adapter[name])
    else:
        with quiet_loading():
            system.model.load_adapter(str(folder), "default", is_trainable=True)


@torch.no_grad()
def _copy(value: torch.Tensor, parameter: torch.Tensor) -> None:
    parameter.copy_(like(value, parameter))


def describe(
    system: MultiAgentSystem, args: SystemArguments, task: TaskArguments, decoding: dict[str, Any]
) -> dict[str, Any]:
    """What `system.json` holds: everything but the weights that :func:`load_run` needs. Paths hold in any folder."""
    return {
        "system": asdict(replace(args, model=_anchored(args.model), topology=_anchored(args.topology))),
        "topology": system.topology.to_dict(),
        "task": asdict(anchored(task)),
        "decoding": decoding,
    }


def anchored(task: TaskArguments) -> TaskArguments:
    """The same arguments with paths that hold in any working folder."""
    source = _anchored(task.task) if task.task.endswith(JSONL) else task.task
    files = {name: _anchored(getattr(task, name)) for name in ("data_dir", "eval_file", "prompts")}
    return replace(task, task=source, **files)


def _anchored(path: str | None) -> str | None:
    """`path` from the root where it is one of something that is there; a name stays a name."""
    # A link keeps its own name: what it points to may be called otherwise, as in the hub's cache.
    return str(Path(path).absolute()) if path and Path(path).exists() else path


def write_description(folder: str | Path, description: dict[str, Any], task: Task) -> None:
    """Write what a run is made from into its folder, `system.json` last."""
    folder = Path(folder)
    if (folder / SYSTEM_FILE).is_file():
        # Going on, its own files are what it was given: where they first came from is kept.
        before = json.loads(read_text(folder / SYSTEM_FILE, "run"))
        for part, name, file in OWN_FILES:
            if description[part][name] == str((folder / file).resolve()):
                description[part][name] = before[part][name]
    roles = {"roles": {name: dict(role) for name, role in task.prompts.roles.items()}}
    _write_yaml(folder / PROMPTS_FILE, roles)
    if description["system"]["topology"] not in TOPOLOGIES:
        _write_yaml(folder / TOPOLOGY_FILE, description["topology"])
    else:
        (folder / TOPOLOGY_FILE).unlink(missing_ok=True)
    write_atomically(folder / SYSTEM_FILE, to_json(description, indent=2) + "\n")


def _write_yaml(path: Path, value: Any) -> None:
    write_atomically(path, yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=120))


def content(task: Task) -> dict[str, Any]:
    """Fingerprints of what a run is made from and its settings do not say: items and prompts."""
    return {"data": fingerprints(task), "prompts": {n: dict(r) for n, r in task.prompts.roles.items()}}


def read_description(folder: str | Path) -> dict[str, Any]:
    """What `system.json` holds, with the files of which the run has its own named by their place in its folder.

    Raises:
        FileNotFoundError: there is none. ValueError: it is no JSON, or not what :func:`describe` writes.
    """
    folder = Path(folder)
    path = folder / SYSTEM_FILE
    if not path.is_file():
        raise FileNotFoundError(f"run {folder} has no {SYSTEM_FILE}; allowed: a folder written by diffmas.train")
    text = read_text(path, "run")
    with reading(str(path)):
        description = json.loads(text)
    parts = ("system", "topology", "task", "decoding")
    if not isinstance(description, dict) or (missing := [p for p in parts if not isinstance(description.get(p), dict)]):
        what = f"no {', '.join(missing)}" if isinstance(description, dict) else f"{type(description).__name__} in it"
        raise ValueError(f"{path} has {what}; allowed: the file that diffmas.train wrote")
    more = ("arguments", "training", "data", "prompts")
    if wrong := [p for p in more if not isinstance(description.get(p, {}), dict)]:
        raise ValueError(f"{path} has no mapping as its {wrong[0]}; allowed: the file that diffmas.train wrote")
    named = (("system", "model"), ("task", "task"))
    if missing := [name for part, name in named if name not in description[part]]:
        raise ValueError(f"{path} does not say its {' and '.join(missing)}; allowed: the file that diffmas.train wrote")
    for part, name, file in OWN_FILES:
        if (folder / file).is_file():
            description[part][name] = str((folder / file).resolve())
    return description


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


def load_run(folder: str | Path, model: str | None = None) -> Run:
    """The system a run's folder describes, with its trained weights, on the base `model` where that is given.

    Raises:
        FileNotFoundError: a folder without `system.json` or without an adapter. ValueError: one that cannot be read.
    """
    folder = Path(folder)
    description = read_description(folder)
    topology = Topology.from_dict(description["topology"])
    args, task = _known(SystemArguments, description["system"]), _known(TaskArguments, description["task"])
    if model is not None and model != args.model:
        print(f"model is {model!r}; the run had {args.model!r}")
        args = replace(args, model=model)
    if not (folder / ADAPTER_FILE).is_file():
        raise FileNotFoundError(f"run {folder} has no {ADAPTER_FILE}; allowed: a run whose training has finished")
    with announced(f"loading {args.model or 'the embedded base'}"):
        model, tokenizer = load_base(args)
    with reading(f"the adapter of run {folder}"), quiet_loading():
        adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    with announced("setting up the system"):
        system = _assemble(adapted, topology, args)
    if system.alignment.kind == "learned":
        _load_alignment(system, folder)
    return Run(system, tokenizer, args, task, description["decoding"], description.get("data", {}))


def _load_alignment(system: MultiAgentSystem, folder: Path) -> None:
    path = folder / ALIGNMENT_FILE
    if not path.is_file():
        raise FileNotFoundError(f"run {folder} has no {ALIGNMENT_FILE}, which a learned alignment is kept in")
    with reading(str(path)):
        _copy(load_file(path)["weight"], system.alignment.weight)


def _known(kind: type, values: dict[str, Any]) -> Any:
    names = {f.name for f in fields(kind)}
    return kind(**{k: v for k, v in values.items() if k in names})
