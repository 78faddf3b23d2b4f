"""Names of the files in a run's folder."""

from __future__ import annotations

from pathlib import Path

from diffmas.models.adapters import DEFAULT

#: What a run was made from, as the run itself keeps it.
PROMPTS_FILE, TOPOLOGY_FILE = "prompts.yaml", "topology.yaml"
SYSTEM_FILE, ALIGNMENT_FILE, ADAPTER_FILE = "system.json", "alignment.safetensors", "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"
#: What is written on the way, and what is left for people.
METRICS_FILE, PROFILE_FILE = "metrics.jsonl", "profile.json"
SUMMARY_FILE, RECORDS_FILE, REPORT_FILE = "summary.json", "eval.jsonl", "report.html"


def adapter_folder(run: str | Path, name: str) -> Path:
    """Where a run keeps an adapter, as stock PEFT does: the default one in its own folder, others in one of theirs."""
    return Path(run) if name == DEFAULT else Path(run, name)
