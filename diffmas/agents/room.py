"""How much memory there is, and requests that could never fit refused by name before anything is allocated.

What is asked for is counted from below (a trace's columns and states, an adapter's weights), so that nothing is
refused that fits.
"""

from __future__ import annotations

import math
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
from torch import nn

from diffmas.agents.costs import Lengths, Plan
from diffmas.agents.trajectory import Trajectory
from diffmas.models.agent_model import AgentModel

if TYPE_CHECKING:
    from diffmas.generation.decoding import Decoding

_CGROUPS, _MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
#: Files of a control group's limit and use, and what of the use is a cache that can be dropped: version 2, version 1.
_CGROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
#: An answer that waits to be decoded takes at least so much of Python's heap.
_ANSWER_BYTES = 500


def available_bytes(device: torch.device | str) -> int:
    """Memory that this process could still allocate on `device`."""
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = min(psutil.virtual_memory().available, cgroup_bytes())
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        free = min(free, limit - psutil.Process().memory_info().vms)
    return max(0, int(free))


def cgroup_bytes(root: Path = _CGROUPS, membership: Path = _MEMBERSHIP) -> float:
    """What the control groups of this process leave it; infinite where none has a limit."""
    lines = membership.read_text().splitlines() if membership.is_file() else []
    folders = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            place = root / (controllers and "memory") / path.lstrip("/")
            # A parent's limit holds too; within a container, the group's own path may not be visible.
            folders += [folder for folder in (place, *place.parents) if folder.is_relative_to(root)]
    return min((_group_bytes(folder) for folder in folders), default=math.inf)


def _group_bytes(folder: Path) -> float:
    for limit, use, cache in _CGROUP_FILES:
        try:
            most, used = (folder / limit).read_text().strip(), int((folder / use).read_text())
            counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        return math.inf if most == "max" else int(most) - used + int(counts.get(cache, 0))
    return math.inf


def check_adapter(model: nn.Module, rank: int, targets: str, copies: int = 1) -> None:
    """Raise `ValueError` where `copies` of the weights of a LoRA adapter of `rank` on `targets` do not fit."""
    names, head = targets.split(","), model.get_output_embeddings()
    layers = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and (module is not head if targets == "all-linear" else any(name.endswith(target) for target in names))
    ]
    needed = copies * rank * sum(m.in_features + m.out_features for m in layers) * torch.float32.itemsize
    if needed > (free := available_bytes("cpu")):
        raise ValueError(f"lora_r is {rank}, which takes at least {gb(needed)}, and {gb(free)} are free; "
                         f"allowed: up to {int(rank * free / needed)}")  # fmt: skip


def check_decoding(
    trajectory: Trajectory, prompt_lengths: Sequence[Lengths], decoding: Decoding, *, all_rows: bool
) -> None:
    """Raise `ValueError` where the traces of rows that are read together cannot fit, before any answer is begun.

    `all_rows`: as many are read at once as are decoded, for a control that exchanges their traces. The answers' own
    columns are allocated as they grow, and do not count.
    """
    waiting = len(prompt_lengths[0]) * decoding.samples * _ANSWER_BYTES
    if waiting > (free := available_bytes("cpu")):
        raise ValueError(
            f"samples is {decoding.samples} for {len(prompt_lengths[0])} rows, which takes at least {gb(waiting)}, and "
            f"{gb(free)} are free; allowed: fewer"
        )
    at_once = decoding.max_rows if all_rows else math.ceil(decoding.max_rows / decoding.samples)
    prompts = [list(lengths[:at_once]) for lengths in prompt_lengths]
    columns = {name: column_bytes(model) for name, model in trajectory.models.items()}
    state = sum(model.state_bytes for model in trajectory.models.values())

    def needed(rows: Sequence[Lengths], steps: int) -> int:
        count = len(rows[0])
        plan = Plan.of(trajectory.topology, steps, rows, [1] * count)
        return sum(columns[name] * n for name, n in zip(plan.models, plan.columns, strict=True)) + state * count

    if (bytes_ := needed(prompts, trajectory.latent_steps)) > (free := available_bytes(trajectory.model.device)):
        longest = max(range(len(prompts[0])), key=lambda row: sum(lengths[row] for lengths in prompts))
        one = [[lengths[longest]] for lengths in prompts]
        if needed(one, 0) > free:
            what = f"the prompts of row {longest + 1} are {sum(n for (n,) in one)} tokens long"
        elif needed(one, trajectory.latent_steps) > free:
            what = f"latent_steps is {trajectory.latent_steps}"
        else:
            what = f"{len(prompts[0])} rows are decoded together (batch_size)"
        raise ValueError(f"{what}: the traces take {gb(bytes_)}, and {gb(free)} are free; allowed: what fits")


def column_bytes(model: AgentModel) -> int:
    """Bytes of one column of a trace, keys and values of all layers together."""
    sizes = model.trace_sizes
    return 2 * sum(g.num_kv_heads * g.head_dim for g in model.layers.values()) * sizes["dtype"].itemsize


def gb(count: float) -> str:
    """Bytes, as people read them."""
    return f"{count / 1e9:.3g} GB"
