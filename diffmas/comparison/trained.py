"""Which method a finished run is, and whether its adapter is what a comparison would train."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffmas.agents.topology import Topology
from diffmas.comparison.comparison import Settings, changes
from diffmas.evaluation.methods import METHODS, Method
from diffmas.runs.description import anchored
from diffmas.runs.files import ADAPTER_FILE
from diffmas.tasks import TaskArguments

#: Settings that leave the weights a training gives as they are, up to rounding.
SAME_WEIGHTS = {"backend", "cuda_graphs", "checkpointing", "loss", "data_dir"}


def own_adapter(run: Path, description: dict[str, Any], settings: Mapping[str, Settings]) -> tuple[str, str] | None:
    """Task and method whose training `run` is; None where it is none of them, said in a line where it nearly is.

    Args:
        description: the run's own; empty where it is none.
        settings: by task, what would be trained.
    """
    task = next((n for n in settings if description and _same_task(n, description["task"]["task"])), None)
    if task is None or not (run / ADAPTER_FILE).is_file():
        return None
    method = _method_of(description)
    if (other := trained_otherwise(settings[task], METHODS[method], description)) is None:
        return task, method
    print(f"{run} was trained with {other}: its adapter is not taken for {method}")
    return None


def _same_task(a: str, b: str) -> bool:
    return anchored(TaskArguments(task=a)).task == anchored(TaskArguments(task=b)).task


def _method_of(description: dict[str, Any]) -> str:
    """The method a run of `diffmas.train` is."""
    topology = Topology.from_dict(description["topology"])
    if len(topology.agents) == 1:
        return "single+sft"
    # Of two agents, one trace is all traces put together.
    if len(topology.agents) > 2 and METHODS["stitch+train"].topology(topology).agents == topology.agents:
        return "stitch+train"
    return "diffmas+detach" if description["system"]["detach_trace"] else "diffmas"


def trained_otherwise(settings: Settings, method: Method, description: dict[str, Any]) -> str | None:
    """What a run's training had set differently from `settings`; None where it gives the same weights."""
    now = settings.describe()
    now["task"] = asdict(anchored(settings.task))
    now["system"] |= method.settings
    now["topology"] = method.topology(settings.topology).to_dict()
    same = SAME_WEIGHTS if settings.task.splits_one_file else SAME_WEIGHTS | {"eval_size", "eval_file"}
    for part in ("system", "topology", "task", "training"):
        for key, _, was in changes(json.loads(json.dumps(now[part])), description.get(part, {})):
            if key not in same and key != "seed":
                return f"{key} {was!r}"
    return None
