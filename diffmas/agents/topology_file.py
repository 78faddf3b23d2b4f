"""The YAML form of a topology, checked entry by entry."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from diffmas.models.adapters import NONE
from diffmas.prompts import template_fields
from diffmas.prompts.chat_template import parse_kwargs

#: What the YAML form says of an agent, and of an adapter.
_KEYS = ("name", "role", "prompt", "fields", "receives", "bridges", "chat_template_kwargs", "model", "adapter")
_ADAPTER_KEYS = ("path", "train")
_MODEL_KEYS = {"model_name_or_path": str, "gguf_file": str, "dtype": str, "quantization": str, "random_weights": bool}
TOPOLOGY_KEYS = (
    "name", "handover", "handover_sink", "bridge_states", "models", "adapters", "adapter_options", "agents",
)  # fmt: skip


class TopologyError(ValueError):
    """A topology that is no DAG with one last agent."""


def agent_entries(data: Any, models: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """What an :class:`~diffmas.agents.topology.Agent` is made of, for all agents of a topology.

    `models`: what models are made of; names of one that are made alike become the first of them.
    """
    if not isinstance(data, Mapping) or not isinstance(data.get("agents"), list):
        raise TopologyError(f"agents is missing; allowed: a list of {{{', '.join(_KEYS)}}}")
    check_keys("the topology", data, TOPOLOGY_KEYS)
    for entry in data["agents"]:
        if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
            raise TopologyError(f"agent is {entry!r}; allowed: {{{', '.join(_KEYS)}}} with a string name")
        check_keys(f"agent {entry['name']}", entry, _KEYS)
        model = _text(entry, "model", "the name of a model")
        yield dict(
            name=entry["name"],
            senders=_names(entry, "receives"),
            bridges=_names(entry, "bridges"),
            role=_text(entry, "role", "the name of a role"),
            adapter=_text(entry, "adapter", f"a name, or {NONE}"),
            model=next((n for n, options in models.items() if options == models.get(model)), model),
            prompt=_prompt(entry),
            chat_template_kwargs=_options(entry),
        )


def _text(entry: Mapping[str, Any], key: str, allowed: str) -> str:
    if not isinstance(text := entry.get(key) or "", str):
        raise TopologyError(f"{key} of agent {entry['name']} is {text!r}; allowed: {allowed}")
    return text


def model_options(given: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(given, Mapping):
        raise TopologyError(f"models is {given!r}; allowed: a mapping by name")
    found = {}
    for name, options in given.items():
        if not isinstance(options := options or {}, Mapping):
            raise TopologyError(f"model {name} is {options!r}; allowed: {{{', '.join(_MODEL_KEYS)}}}")
        check_keys(f"model {name}", options, tuple(_MODEL_KEYS))
        options = {key: value for key, value in options.items() if value is not None}
        for key, value in options.items():
            if not isinstance(value, kind := _MODEL_KEYS[key]):
                raise TopologyError(f"{key} of model {name} is {value!r}; allowed: {kind.__name__}")
        found[str(name)] = dict(options)
    return found


def adapter_options(given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    found = {}
    for name, options in given.items():
        if not isinstance(options := options or {}, Mapping):
            raise TopologyError(f"adapter {name} is {options!r}; allowed: {{{', '.join(_ADAPTER_KEYS)}}}")
        check_keys(f"adapter {name}", options, _ADAPTER_KEYS)
        if not isinstance(options.get("train", True), bool):
            raise TopologyError(f"train of adapter {name} is {options['train']!r}; allowed: true or false")
        if not isinstance(options.get("path", ""), str):
            raise TopologyError(f"path of adapter {name} is {options['path']!r}; allowed: a folder")
        found[name] = dict(options)
    return found


def _names(entry: Mapping[str, Any], key: str) -> tuple[str, ...]:
    names = entry.get(key) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TopologyError(f"{key} of agent {entry['name']} is {names!r}; allowed: a list of names")
    return tuple(names)


def _prompt(entry: Mapping[str, Any]) -> dict[str, str] | None:
    prompt, fields, name = entry.get("prompt"), entry.get("fields"), entry["name"]
    if fields is not None and not (isinstance(fields, list) and fields and all(isinstance(f, str) for f in fields)):
        raise TopologyError(f"fields of agent {name} is {fields!r}; allowed: a list of names of an item's fields")
    if prompt is None:
        return None if fields is None else {"user": "\n".join(f"{{{field}}}" for field in fields)}
    prompt = {"user": prompt} if isinstance(prompt, str) else prompt
    try:
        named = template_fields(prompt, f"prompt of agent {name}")
    except ValueError as error:
        raise TopologyError(str(error)) from None
    if fields is not None and (unseen := [field for field in named if field not in fields]):
        raise TopologyError(f"prompt of agent {name} names {unseen}, which it does not see; allowed: {fields}")
    return dict(prompt)


def _options(entry: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return parse_kwargs(entry.get("chat_template_kwargs"), f"chat_template_kwargs of agent {entry['name']}")
    except ValueError as error:
        raise TopologyError(str(error)) from None


def check_keys(what: str, entry: Mapping[str, Any], allowed: tuple[str, ...]) -> None:
    if unknown := [key for key in entry if key not in allowed]:
        raise TopologyError(f"{what} has unknown keys {unknown}; allowed: {', '.join(allowed)}")
