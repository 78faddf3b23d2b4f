"""The models of a team: as they are given, as the topology describes them, or as a run's settings name them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from diffmas.agents.topology import Topology
from diffmas.embedded import embedded_path
from diffmas.models.adapters import DEFAULT
from diffmas.models.pretrained import load_base
from diffmas.models.source import check_source
from diffmas.runs.settings import SystemArguments
from diffmas.support.progress import announced

if TYPE_CHECKING:
    from diffmas.system import MultiAgentSystem

Tokenizers = dict[str, PreTrainedTokenizerBase]


def sources(settings: SystemArguments, topology: Topology) -> dict[str, dict[str, Any]]:
    """What :func:`~diffmas.models.pretrained.load_base` is given for every model, by the topology's names.

    Raises:
        ValueError: settings of a model that no agent runs on, or one that goes by two names.
    """
    own = {
        "model_name_or_path": settings.model_name_or_path,
        "gguf_file": settings.gguf_file,
        "dtype": settings.dtype,
        "quantization": settings.quantization,
        "random_weights": settings.random_weights,
    }
    found = {}
    for name in topology.model_names:
        # What it does not say of weights is as in the settings.
        plain = own | {"model_name_or_path": None, "gguf_file": None}
        found[name] = own if name == DEFAULT else plain | dict(topology.models[name])
        if same := [other for other in found if other != name and _same(found[other], found[name])]:
            raise ValueError(
                f"models {same[0]} and {name} are one ({found[name]['model_name_or_path'] or 'the embedded base'}); "
                f"allowed: one name for it ({DEFAULT}: of agents that name no model)"
            )
    if DEFAULT not in found and own["model_name_or_path"] is not None:
        raise ValueError(
            f"model_name_or_path is {own['model_name_or_path']!r}, and every agent names a model of topology "
            f"{topology.name!r}; allowed: none"
        )
    return found


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    paths = [_place(source["model_name_or_path"]) for source in (one, other)]
    return paths[0] == paths[1] and {**one, "model_name_or_path": None} == {**other, "model_name_or_path": None}


def _place(name: str | None) -> str | None:
    """A folder however it is spelled, or else the name."""
    name = embedded_path(name) or name
    return os.path.realpath(name) if name is not None and os.path.exists(name) else name


def described(system: MultiAgentSystem) -> Topology:
    """The topology of a system, with every model in it described well enough to be loaded.

    Raises:
        ValueError: a model that comes from nowhere it could be loaded from.
    """
    topology, found = system.topology, {}
    for name, options in topology.models.items():
        model = system.models[name].language_model
        config, dtype = model.config, str(model.dtype).removeprefix("torch.")
        path, file = getattr(config, "gguf_source", (config._name_or_path or None, None))
        if not options and path is None:
            raise ValueError(
                f"model {name} comes from no folder and no repository; allowed: one that can be loaded again"
            )
        found[name] = options or {"model_name_or_path": path, "gguf_file": file, "dtype": dtype}
    return replace(topology, models=found)


def check_sources(settings: SystemArguments, topology: Topology) -> None:
    """Whether all models can be had, before anything is loaded; raises as :func:`sources` and `check_source` do."""
    for source in sources(settings, topology).values():
        check_source(source["model_name_or_path"], source["gguf_file"])


def load_bases(settings: SystemArguments, topology: Topology) -> tuple[dict[str, nn.Module], Tokenizers]:
    """The models of a run and their tokenizers, by the topology's names, the last agent's first."""
    models, tokenizers = {}, {}
    for name, source in sources(settings, topology).items():
        models[name], tokenizers[name] = _load(source)
    return models, tokenizers


def load_models(
    topology: Topology,
    model: nn.Module | str | Mapping[str, nn.Module | str],
    tokenizer: PreTrainedTokenizerBase | Mapping[str, PreTrainedTokenizerBase] | None,
) -> tuple[dict[str, nn.Module], Tokenizers]:
    """Models and those tokenizers that there are; what is given by name, or only described by the topology, is loaded.

    Raises:
        ValueError: a model that is not given, or one too many, named; one under two names.
    """
    names = topology.model_names
    given = dict(model) if isinstance(model, Mapping) else {names[0]: model}
    if unknown := [name for name in given if name not in names]:
        raise ValueError(f"model has {unknown}, which no agent runs on; allowed: {', '.join(names)}")
    tokenizers: Tokenizers = {}
    if tokenizer is not None:
        tokenizers = dict(tokenizer) if isinstance(tokenizer, Mapping) else {names[0]: tokenizer}
    models: dict[str, nn.Module] = {}
    for name in names:
        base = given.get(name)
        if base is None and not topology.models.get(name):
            raise ValueError(f"model has {list(given)}, and agents run on {', '.join(names)}; allowed: one for each")
        if base is None or isinstance(base, str):
            source = {"model_name_or_path": base} if base else topology.models[name]
            base, beside = _load(source)
            tokenizers.setdefault(name, beside)
        if same := [other for other, module in models.items() if module is base]:
            raise ValueError(f"models {same[0]} and {name} are one; allowed: one name for it")
        models[name] = base
    return models, tokenizers


def _load(source: Mapping[str, Any]) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    options = {name: value for name, value in source.items() if name != "model_name_or_path"}
    path = source.get("model_name_or_path")
    with announced(f"loading {path or 'the embedded base'}"):
        return load_base(path, **options)
