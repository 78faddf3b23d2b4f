"""The weights of a run: what training changes, and nothing else."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from diffmas.models.adapters import load_adapter
from diffmas.runs.card import write_card
from diffmas.runs.files import ADAPTER_FILE, ALIGNMENT_FILE, SYSTEM_FILE, adapter_folder
from diffmas.support.distributed import is_sharded, like, process, whole
from diffmas.support.failures import reading, writing
from diffmas.support.quiet import quiet_loading

if TYPE_CHECKING:
    from diffmas.system import MultiAgentSystem


def save_weights(system: MultiAgentSystem, folder: str | Path) -> None:
    """Write what training changes: the adapters, as stock PEFT loads them, and a learned alignment.

    Of several processes the first writes; all of them have to call this, since sharded weights are gathered.
    """
    folder, first = Path(folder), process() == 0
    folder.mkdir(parents=True, exist_ok=True)
    model, alignment = system.agent_model.model, system.agent_model.alignment
    names, trained = system.topology.adapter_names, None
    if is_sharded(system):
        trained = {n: whole(p.detach()).cpu() for n, p in model.named_parameters() if _is_kept(n, p, names)}
    aligning = {n: whole(p.detach()) for n, p in alignment.named_parameters()}
    if not first:
        return
    # Beside, and then renamed, the adapter last: where it is, all else is, and nothing is half written.
    beside = folder / ".weights"
    shutil.rmtree(beside, ignore_errors=True)
    with writing(folder / ADAPTER_FILE):
        model.save_pretrained(beside, selected_adapters=list(names), state_dict=trained)
    # Of a checkpoint, the description is in the run's folder, above the one it is written in.
    described = (path / SYSTEM_FILE for path in (folder, *folder.parents[:2]))
    write_card(system, beside, next((path for path in described if path.is_file()), None))
    if aligning:
        with writing(folder / ALIGNMENT_FILE):
            save_file({n: p.cpu().contiguous() for n, p in aligning.items()}, beside / ALIGNMENT_FILE)
    files = [path for path in beside.rglob("*") if path.is_file()]
    for path in sorted(files, key=lambda path: path == beside / ADAPTER_FILE):
        place = folder / path.relative_to(beside)
        place.parent.mkdir(exist_ok=True)
        os.replace(path, place)
    shutil.rmtree(beside)


def _without(path: str, adapter: str) -> str:
    """As PEFT keeps it: without the adapter's name, which is no module's."""
    return ".".join(part for part in path.split(".") if part != adapter)


def _is_kept(name: str, parameter: torch.nn.Parameter, adapters: Sequence[str]) -> bool:
    return parameter.requires_grad or any(f".{adapter}." in f"{name}." for adapter in adapters)


def load_weights(system: MultiAgentSystem, folder: str | Path) -> None:
    """Read what :func:`save_weights` wrote into `system`."""
    folder = Path(folder)
    for name in system.topology.adapter_names:
        path = adapter_folder(folder, name) / ADAPTER_FILE
        if not path.is_file():
            raise FileNotFoundError(f"checkpoint {folder} has no {path.relative_to(folder)}")
        with reading(str(path)):
            _load_adapter(system, path.parent, name)
    system.choose_trained()
    if system.agent_model.alignment.options.trains:
        load_alignment(system, folder)


def _load_adapter(system: MultiAgentSystem, folder: Path, name: str) -> None:
    if is_sharded(system):
        parameters = system.agent_model.model.named_parameters()
        adapter = {_without(n, name): p for n, p in parameters if _is_kept(n, p, [name])}
        for key, value in load_file(folder / ADAPTER_FILE).items():
            _copy(value, adapter[key])
    else:
        with quiet_loading():
            load_adapter(system.agent_model.model, name, folder)


@torch.no_grad()
def _copy(value: torch.Tensor, parameter: torch.Tensor) -> None:
    parameter.copy_(like(value, parameter))


def load_alignment(system: MultiAgentSystem, folder: Path) -> None:
    path = folder / ALIGNMENT_FILE
    if not path.is_file():
        raise FileNotFoundError(f"run {folder} has no {ALIGNMENT_FILE}, which a learned alignment is kept in")
    with reading(str(path)):
        kept = load_file(path)
        for name, parameter in system.agent_model.alignment.named_parameters():
            _copy(kept[name], parameter)
