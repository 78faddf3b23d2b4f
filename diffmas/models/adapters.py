"""Calls that run with an adapter of their own, on one model: the adapter is part of the call.

PEFT's `set_adapter` walks the whole model and changes what trains. Here each layer looks, before it runs, which adapter
its call names, and switches its own modules where they have another; so does activation checkpointing, which runs a
layer again with the call it ran with.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from diffmas.models.errors import UnsupportedModelError
from diffmas.models.in_place import put_in_front
from diffmas.models.outline import decoder_of
from diffmas.support.failures import reading
from diffmas_ops import Call, KVTrace

if TYPE_CHECKING:
    from diffmas.models.agent_model import AgentModel, Lengths

#: The adapter that a run keeps in any case; and what is said for none at all.
DEFAULT, NONE = "default", "none"
#: What PEFT calls an adapter's files.
WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
#: Where a model keeps its switch, and a layer its modules.
_SWITCH, _ADAPTED = "adapter_switch", "adapted_modules"


class _Active(list):
    """What a module keeps as its active adapters while a call has chosen them."""


#: By the adapter of a call.
_CHOSEN: dict[str, _Active] = {NONE: _Active()}


def put_on(model: Any, config: PeftConfig, names: Sequence[str], paths: Mapping[str, str]) -> Any:
    """`model` in PEFT with adapters `names`, the default one first, each of `config` or as its folder in `paths` is.

    Raises:
        ValueError: a name that means something in the model; a folder without what an adapter of it needs.
        FileNotFoundError: a folder without an adapter.
    """
    check_names(model, names)
    begun = {name: _config_in(name, paths[name]) for name in names if paths.get(name)}
    adapted = get_peft_model(model, begun.get(DEFAULT, config))
    for name in names[1:]:
        adapted.add_adapter(name, begun.get(name, config))
    for name in begun:
        load_adapter(adapted, name, paths[name])
    return adapted


def _config_in(name: str, folder: str) -> PeftConfig:
    for file in (WEIGHTS_FILE, CONFIG_FILE):
        if not Path(folder, file).is_file():
            raise FileNotFoundError(f"adapter {name} begins at {folder!r}, which has no {file}")
    with reading(str(Path(folder, CONFIG_FILE))):
        config = PeftConfig.from_pretrained(folder)
    config.inference_mode = False
    return config


def check_names(model: nn.Module, names: Sequence[str]) -> None:
    """Raise `ValueError` for the name of a module, by which PEFT would tell weights apart when it keeps them."""
    taken = {part for path, _ in model.named_modules() for part in path.split(".")}
    taken |= {"weight", "bias", "model", "base_model", "base_layer", "modules_to_save", "original_module"}
    for name in names:
        # PEFT looks for a prefix of its own in what it keeps.
        if name != DEFAULT and (name in taken or name in "lora_" or "lora_" in name or hasattr(nn.ModuleDict, name)):
            raise ValueError(f"adapter {name!r} is called like a part of the model; allowed: another name")


def load_adapter(model: Any, name: str, folder: str | Path) -> None:
    """Read the weights that `folder` keeps into adapter `name`, which is on `model`.

    Raises:
        ValueError: weights of other layers or shapes.
    """
    with reading(str(Path(folder, WEIGHTS_FILE))):
        found = model.load_adapter(str(folder), name, is_trainable=True)
    if missing := [key for key in found.missing_keys if name in key.split(".")]:
        raise ValueError(
            f"{Path(folder, WEIGHTS_FILE)} lacks {len(missing)} weights of adapter {name!r}, such as {missing[0]}; "
            "allowed: an adapter of the same layers"
        )


@contextlib.contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Without any adapter; PEFT's own way back would let only those train that are active."""
    before = [(module, vars(module)["_disable_adapters"]) for module in adapted_modules(model)]
    for module, _ in before:
        vars(module)["_disable_adapters"] = True
    try:
        yield
    finally:
        for module, disabled in before:
            vars(module)["_disable_adapters"] = disabled


def choose_trained(model: nn.Module, names: Sequence[str], trained: Iterable[str]) -> None:
    """Of the adapters `names`, let those `trained` train and no other; PEFT lets only one that is active."""
    trained = set(trained)
    for module in adapted_modules(model):
        for part in _parts(module):
            for name in names:
                if name in part:
                    part[name].requires_grad_(name in trained)


def _parts(module: Any) -> list[Any]:
    """Dictionaries of a module's adapters by name."""
    if isinstance(module, BaseTunerLayer):
        return [getattr(module, name) for name in module.adapter_layer_names if hasattr(module, name)]
    return [module.modules_to_save] if hasattr(module, "modules_to_save") else []


def adapted_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of `model` that PEFT has put adapters on."""
    return [m for m in model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]


class AdapterSwitch:
    """Has the modules of `model` run with the adapter of the call that reaches them, and gives back what PEFT was told.

    One is enough for a model, whatever number of systems are on it; it is found again by :func:`switch_of`.
    """

    def __init__(self, model: PreTrainedModel):
        layers = [m for child in decoder_of(model).children() if isinstance(child, nn.ModuleList) for m in child]
        inside = {id(m) for layer in layers for m in adapted_modules(layer)}
        # Around the layers, modules are switched for as long as a call runs.
        self._around = _Modules([m for m in adapted_modules(model) if id(m) not in inside])
        for layer in layers:
            vars(layer)[_ADAPTED] = _Modules(adapted_modules(layer))
            kind: Any = type(layer)
            layer.__class__ = put_in_front(SwitchingLayer, kind)

    def for_call(self, call: Call) -> contextlib.AbstractContextManager[None]:
        """Switch what is not in a layer."""
        return self._around.running(call.adapter) if self._around else contextlib.nullcontext()


def switch_of(model: PreTrainedModel, *, install: bool = False) -> AdapterSwitch | None:
    """The switch that is on `model`; `install`: a new one, for adapters as they are now."""
    if install:
        vars(model)[_SWITCH] = AdapterSwitch(model)
    return vars(model).get(_SWITCH)


class SwitchingLayer:
    """What an :class:`AdapterSwitch` puts in front of a layer's class; a hook would not run when it is run again."""

    def forward(self, *args, **kwargs):
        # Without a trace, as when the model is looked at, layers run with what is active.
        name = None if kwargs.get("trace_layers") is None else kwargs["trace_call"].adapter
        with switched(self, name):
            return super().forward(*args, **kwargs)


def switched(layer: Any, name: str | None) -> contextlib.AbstractContextManager[None]:
    """A layer with adapter `name` of a call; None: as PEFT was told."""
    return contextlib.nullcontext() if name is None else vars(layer)[_ADAPTED].running(name)


class _Modules:
    """Adapted modules that are switched together."""

    def __init__(self, modules: list[nn.Module]):
        self._modules = modules

    def __len__(self) -> int:
        return len(self._modules)

    @contextlib.contextmanager
    def running(self, name: str | None) -> Iterator[None]:
        """With adapter `name`; None: as PEFT was told.

        Raises:
            UnsupportedModelError: adapters that are merged into the model, which no call can choose among.
        """
        if name is None or not self._modules:
            yield
            return
        if getattr(self._modules[0], "merged_adapters", None):
            raise UnsupportedModelError(
                f"adapters {self._modules[0].merged_adapters} are merged into the model, whose agents have several; "
                "allowed: unmerge_adapter()"
            )
        chosen = _CHOSEN.setdefault(name, _Active([name]))
        own = [vars(module)["_active_adapter"] for module in self._modules]
        for module in self._modules:
            vars(module)["_active_adapter"] = chosen
        try:
            yield
        finally:
            for module, told in zip(self._modules, own, strict=True):
                vars(module)["_active_adapter"] = told


class WithAdapter:
    """An :class:`AgentModel` whose calls run with one of its adapters, or with "none"; all else is the model's."""

    def __init__(self, model: AgentModel, adapter: str):
        self.model_, self.adapter = model, adapter

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "model_":
            raise AttributeError(name)
        return getattr(self.model_, name)

    def read(
        self, trace: KVTrace, lengths: Lengths | Call, *, outputs: Sequence[tuple[int, int]] | None = None, **inputs
    ) -> Tensor:
        """See :meth:`AgentModel.read`."""
        if not isinstance(lengths, Call):
            lengths, outputs = trace.open(lengths, outputs), None
        lengths.adapter = self.adapter
        return self.model_.read(trace, lengths, outputs=outputs, **inputs)

    def run(self, call: Call, **inputs) -> Tensor:
        """See :meth:`AgentModel.run`."""
        call.adapter = self.adapter
        return self.model_.run(call, **inputs)
