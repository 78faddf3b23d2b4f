"""What a run keeps of how it was made: `system.json`, prompts and topology, and fingerprints of its items."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import snapshot_download

from diffmas.agents.topology import TOPOLOGIES
from diffmas.models.adapters import DEFAULT
from diffmas.models.source import check_source
from diffmas.prompts import Prompts
from diffmas.runs.files import PROMPTS_FILE, SYSTEM_FILE, TOPOLOGY_FILE
from diffmas.runs.models import described
from diffmas.runs.settings import SystemArguments
from diffmas.support.atomic import write_atomically
from diffmas.support.failures import reading
from diffmas.support.text_file import read_text
from diffmas.support.valid_json import to_json
from diffmas.tasks import Task, TaskArguments
from diffmas.tasks.base import JSONL
from diffmas.tasks.content import fingerprints

if TYPE_CHECKING:
    from diffmas.system import MultiAgentSystem

#: Part and name of the settings that a file in the run's folder stands for.
OWN_FILES = (("task", "prompts", PROMPTS_FILE), ("system", "topology", TOPOLOGY_FILE))


def describe(
    system: MultiAgentSystem, args: SystemArguments, task: TaskArguments, decoding: dict[str, Any]
) -> dict[str, Any]:
    """What `system.json` holds: everything but the weights that :func:`load_run` needs. Paths hold in any folder."""
    return {
        "system": asdict(
            replace(
                args,
                model_name_or_path=_anchored(args.model_name_or_path),
                topology=_anchored(args.topology),
            )
        ),
        "topology": _anchored_models(described(system).to_dict()),
        "task": asdict(anchored(task)),
        "decoding": decoding,
    }


def settings_of(system: MultiAgentSystem) -> SystemArguments:
    """What a run of this system would have had to be given."""
    model, trajectory, lora = system.agent_model, system.trajectory, system.agent_model.model.peft_config["default"]
    base = system.models.get(DEFAULT)
    modules = lora.target_modules or ()
    if not isinstance(modules, str):
        modules = ",".join(sorted({name.rpartition(".")[2] for name in modules}))
    source = gguf_file = None
    if base is not None:
        config = base.language_model.config
        source, gguf_file = getattr(config, "gguf_source", (config._name_or_path or None, None))
    given = SystemArguments(
        model_name_or_path=source,
        gguf_file=gguf_file,
        dtype=str(model.language_model.dtype).removeprefix("torch."),
        topology=trajectory.topology.name,
        lora_r=getattr(lora, "r", 0),
        lora_alpha=getattr(lora, "lora_alpha", 0),
        use_rslora=getattr(lora, "use_rslora", False),
        lora_target_modules=modules,
        **system.options,
    )
    return replace(
        known(SystemArguments, system.description["system"]) if system.description else given,
        latent_steps=trajectory.latent_steps,
        **asdict(system.alignment_options),
        **asdict(system.bridge_options),
        detach_trace=trajectory.detach_trace,
        checkpointing=model.checkpointing.mode,
        backend=model.backend,
    )


def anchored(task: TaskArguments) -> TaskArguments:
    """The same arguments with paths that hold in any working folder."""
    source = _anchored(task.task) if task.task.endswith(JSONL) else task.task
    files: dict[str, Any] = {name: _anchored(getattr(task, name)) for name in ("data_dir", "eval_file", "prompts")}
    return replace(task, task=source, **files)


def _anchored_models(topology: dict[str, Any]) -> dict[str, Any]:
    for options in topology.get("models", {}).values():
        options |= {"model_name_or_path": _anchored(options.get("model_name_or_path"))}
    return topology


def _anchored(path: str | None) -> str | None:
    """`path` from the root where it is one of something that is there; a name stays a name."""
    # A link keeps its own name: what it points to may be called otherwise, as in the hub's cache.
    return str(Path(path).absolute()) if path and Path(path).exists() else path


def write_description(folder: str | Path, description: dict[str, Any], prompts: Prompts) -> None:
    """Write what a run is made from into its folder, `system.json` last."""
    folder = Path(folder)
    if (folder / SYSTEM_FILE).is_file():
        # Going on, its own files are what it was given: where they first came from is kept.
        before = json.loads(read_text(folder / SYSTEM_FILE, "run"))
        for part, name, file in OWN_FILES:
            if description[part][name] == str((folder / file).resolve()):
                description[part][name] = before[part][name]
    if prompts.roles:
        _write_yaml(folder / PROMPTS_FILE, {"roles": {name: dict(role) for name, role in prompts.roles.items()}})
    else:
        (folder / PROMPTS_FILE).unlink(missing_ok=True)
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
    more = ("arguments", "training", "data", "prompts", "continues")
    if wrong := [p for p in more if not isinstance(description.get(p, {}), dict)]:
        raise ValueError(f"{path} has no mapping as its {wrong[0]}; allowed: the file that diffmas.train wrote")
    named = (("system", "model_name_or_path"), ("task", "task"))
    if missing := [name for part, name in named if name not in description[part]]:
        raise ValueError(f"{path} does not say its {' and '.join(missing)}; allowed: the file that diffmas.train wrote")
    for part, name, file in OWN_FILES:
        if (folder / file).is_file():
            description[part][name] = str((folder / file).resolve())
    return description


def known(kind: type, values: dict[str, Any]) -> Any:
    """A dataclass from those of `values` that it has fields for."""
    names = {f.name for f in fields(kind)}
    return kind(**{k: v for k, v in values.items() if k in names})


def fetched(name_or_path: str | Path, revision: str | None = None) -> Path:
    """The folder itself, or a local copy of the repository on the hub.

    Raises:
        FileNotFoundError: neither.
    """
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    check_source(str(name_or_path))
    return Path(snapshot_download(str(name_or_path), revision=revision))
