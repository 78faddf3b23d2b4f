"""The weights of a run: what training changes, and nothing else."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file

from diffmas.agents.topology import Topology
from diffmas.models.adapters import DEFAULT, load_adapter
from diffmas.runs.card import write_card
from diffmas.runs.files import ADAPTER_FILE, ALIGNMENT_FILE, BRIDGES_FILE, SYSTEM_FILE, adapter_folders, model_folder
from diffmas.support.distributed import is_sharded, like, process, whole
from diffmas.support.failures import reading, writing
from diffmas.support.quiet import quiet_loading

if TYPE_CHECKING:
    from diffmas.system import MultiAgentSystem


def save_weights(system: MultiAgentSystem, folder: str | Path) -> None:
    """Write what training changes: the adapters, as stock PEFT loads them, learned alignments, and bridges.

    Of several processes the first writes; all of them have to call this, since sharded weights are gathered.
    """
    folder, first, topology = Path(folder), process() == 0, system.topology
    folder.mkdir(parents=True, exist_ok=True)
    trained: dict[str, dict[str, torch.Tensor] | None] = dict.fromkeys(system.models)
    if is_sharded(system):
        for name, model in system.models.items():
            kept = ((n, p) for n, p in model.model.named_parameters() if _is_kept(n, p, topology.adapters_on(name)))
            trained[name] = {n: whole(p.detach()).cpu() for n, p in kept}
    others = {file: {n: whole(p.detach()) for n, p in own.items()} for file, own in _others(system).items()}
    if not first:
        return
    # Beside, and then renamed, the last agent's adapter last: where it is, all else is, and nothing is half written.
    beside = folder / ".weights"
    shutil.rmtree(beside, ignore_errors=True)
    with writing(folder / ADAPTER_FILE):
        for name, model in system.models.items():
            place, adapters = model_folder(beside, topology, name), list(topology.adapters_on(name))
            model.model.save_pretrained(place, selected_adapters=adapters, state_dict=trained[name])
    # Of a checkpoint, the description is in the run's folder, above the one it is written in.
    described = (path / SYSTEM_FILE for path in (folder, *folder.parents[:2]))
    write_card(system, beside, next((path for path in described if path.is_file()), None))
    for file, parameters in others.items():
        with writing(folder / file):
            save_file({n: p.cpu().contiguous() for n, p in parameters.items()}, beside / file)
    files = [path for path in beside.rglob("*") if path.is_file()]
    for path in sorted(files, key=lambda path: path == beside / ADAPTER_FILE):
        place = folder / path.relative_to(beside)
        place.parent.mkdir(exist_ok=True, parents=True)
        os.replace(path, place)
    shutil.rmtree(beside)


def _others(system: MultiAgentSystem) -> dict[Path, dict[str, torch.nn.Parameter]]:
    """Parameters that are trained and no adapter's, by the file of the run that they are kept in."""
    kept = {Path(BRIDGES_FILE): dict(system.bridges.named_weights())}
    for name, model in system.models.items():
        kept[model_folder("", system.topology, name) / ALIGNMENT_FILE] = dict(model.alignment.named_parameters())
    return {file: parameters for file, parameters in kept.items() if parameters}


def _without(path: str, adapter: str) -> str:
    """As PEFT keeps it: without the adapter's name, which is no module's."""
    return ".".join(part for part in path.split(".") if part != adapter)


def _is_kept(name: str, parameter: torch.nn.Parameter, adapters: Sequence[str]) -> bool:
    return parameter.requires_grad or any(f".{adapter}." in f"{name}." for adapter in adapters)


def load_adapted(bases: Mapping[str, torch.nn.Module], folder: Path, topology: Topology) -> dict[str, PeftModel]:
    """The bases of a run, by the topology's names for them, with the adapters that its folder keeps."""
    adapted = {}
    for model, base in bases.items():
        places = adapter_folders(folder, topology, model)
        with reading(f"the adapter of run {folder}"), quiet_loading():
            adapted[model] = PeftModel.from_pretrained(base, str(places[DEFAULT]), is_trainable=True)
            for name, place in list(places.items())[1:]:
                adapted[model].add_adapter(name, PeftConfig.from_pretrained(str(place)))
                load_adapter(adapted[model], name, place)
    return adapted


def load_weights(system: MultiAgentSystem, folder: str | Path) -> None:
    """Read what :func:`save_weights` wrote into `system`."""
    folder = Path(folder)
    for name, model in system.models.items():
        for adapter, place in adapter_folders(folder, system.topology, name).items():
            if not (path := place / ADAPTER_FILE).is_file():
                raise FileNotFoundError(f"checkpoint {folder} has no {path.relative_to(folder)}")
            with reading(str(path)):
                _load_adapter(model.model, place, adapter, sharded=is_sharded(system))
    system.choose_trained()
    load_others(system, folder)


def _load_adapter(model: torch.nn.Module, folder: Path, name: str, *, sharded: bool) -> None:
    if sharded:
        adapter = {_without(n, name): p for n, p in model.named_parameters() if _is_kept(n, p, [name])}
        for key, value in load_file(folder / ADAPTER_FILE).items():
            _copy(value, adapter[key])
    else:
        with quiet_loading():
            load_adapter(model, name, folder)


@torch.no_grad()
def _copy(value: torch.Tensor, parameter: torch.Tensor) -> None:
    parameter.copy_(like(value, parameter))


def load_others(system: MultiAgentSystem, folder: Path) -> None:
    """Read what is trained and no adapter's: a learned alignment, bridges."""
    for file, parameters in _others(system).items():
        path = folder / file
        if not path.is_file():
            raise FileNotFoundError(f"run {folder} has no {file}, which {len(parameters)} of its weights are kept in")
        with reading(str(path)):
            kept = load_file(path)
            for name, parameter in parameters.items():
                _copy(kept[name], parameter)
