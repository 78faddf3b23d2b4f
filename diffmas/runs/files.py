"""Names of the files in a run's folder."""

from __future__ import annotations

from pathlib import Path

from diffmas.agents.topology import Topology
from diffmas.models.adapters import DEFAULT

#: What a run was made from, as the run itself keeps it.
PROMPTS_FILE, TOPOLOGY_FILE = "prompts.yaml", "topology.yaml"
SYSTEM_FILE, ALIGNMENT_FILE, ADAPTER_FILE = "system.json", "alignment.safetensors", "adapter_model.safetensors"
BRIDGES_FILE = "bridges.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"
#: What is written on the way, and what is left for people.
METRICS_FILE, PROFILE_FILE = "metrics.jsonl", "profile.json"
SUMMARY_FILE, RECORDS_FILE, REPORT_FILE = "summary.json", "eval.jsonl", "report.html"


def model_folder(run: str | Path, topology: Topology, model: str) -> Path:
    """Where a run keeps the weights of a model: the last agent's in its own folder, others in one of their name."""
    return Path(run) if model == topology.model_names[0] else Path(run, model)


def adapter_folders(run: str | Path, topology: Topology, model: str) -> dict[str, Path]:
    """Where a run keeps the adapters of a model, as stock PEFT does: the default one in the model's own folder, others
    in one of their name."""
    place = model_folder(run, topology, model)
    return {name: place if name == DEFAULT else place / name for name in topology.adapters_on(model)}


def all_adapter_folders(run: str | Path, topology: Topology) -> list[Path]:
    """Those of all models; the run's own folder first."""
    return [place for model in topology.model_names for place in adapter_folders(run, topology, model).values()]
