"""Calls that run with an adapter of their own, on one model: the adapter is part of the call.

PEFT's `set_adapter` walks the whole model and changes what trains. Here each layer looks, before it runs, which adapter
its call names, and switches its own modules where they have another; so does activation checkpointing, which runs a
layer again with the call it ran with.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from diffmas.models.in_place import put_in_front
from diffmas.models.outline import decoder_of
from diffmas_ops import Call, KVTrace

if TYPE_CHECKING:
    from diffmas.models.agent_model import AgentModel, Lengths

#: The adapter that a run keeps in any case; and what is said for none at all.
DEFAULT, NONE = "default", "none"
#: Where a model keeps its switch, and a layer its modules.
_SWITCH, _ADAPTED = "adapter_switch", "adapted_modules"


class _Active(list):
    """What a module keeps as its active adapters while a call has chosen them."""


#: By the adapter of a call; always the same list, by which what was read of a module is known to hold.
_CHOSEN: dict[str, _Active] = {NONE: _Active()}


def add_adapters(model: Any, names: Sequence[str]) -> None:
    """Give `model`, which is in PEFT, those adapters of `names` that it lacks, like its default one."""
    for name in names:
        if name not in model.peft_config:
            model.add_adapter(name, model.peft_config[DEFAULT])


def choose_trained(model: nn.Module, names: Sequence[str], trained: Iterable[str]) -> None:
    """Of the adapters `names`, let those `trained` train and no other; PEFT lets only one that is active."""
    trained = set(trained)
    for module in _adapted(model):
        for part in _parts(module):
            for name in names:
                if name in part:
                    part[name].requires_grad_(name in trained)


def _parts(module: Any) -> list[Any]:
    """Dictionaries of a module's adapters by name."""
    if isinstance(module, BaseTunerLayer):
        return [getattr(module, name) for name in module.adapter_layer_names if hasattr(module, name)]
    return [module.modules_to_save] if hasattr(module, "modules_to_save") else []


def _adapted(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]


class AdapterSwitch:
    """Has the modules of `model` run with the adapter of the call that reaches them.

    One is enough for a model, whatever number of systems are on it; it is found again by :func:`switch_of`.
    """

    def __init__(self, model: PreTrainedModel):
        layers = [m for child in decoder_of(model).children() if isinstance(child, nn.ModuleList) for m in child]
        inside = {id(m) for layer in layers for m in _adapted(layer)}
        # Around the layers, modules are switched when a call begins.
        self._around = _Modules([m for m in _adapted(model) if id(m) not in inside])
        for layer in layers:
            vars(layer)[_ADAPTED] = _Modules(_adapted(layer))
            kind: Any = type(layer)
            layer.__class__ = put_in_front(SwitchingLayer, kind)

    def begin(self, call: Call) -> None:
        """Switch what is not in a layer."""
        self._around.choose(call.adapter)


def switch_of(model: PreTrainedModel, *, install: bool = False) -> AdapterSwitch | None:
    """The switch that is on `model`; None where there is none, and none is to be installed."""
    if install and _SWITCH not in vars(model):
        vars(model)[_SWITCH] = AdapterSwitch(model)
    return vars(model).get(_SWITCH)


class SwitchingLayer:
    """What an :class:`AdapterSwitch` puts in front of a layer's class; a hook would not run when it is run again."""

    def forward(self, *args, **kwargs):
        # Without a trace, as when the model is looked at, layers run with what is active.
        if kwargs.get("trace_layers") is not None:
            vars(self)[_ADAPTED].choose(kwargs["trace_call"].adapter)
        return super().forward(*args, **kwargs)


class _Modules:
    """Adapted modules that are switched together."""

    def __init__(self, modules: list[nn.Module]):
        self._modules, self._own = modules, [vars(m)["_active_adapter"] for m in modules]

    def choose(self, name: str | None) -> None:
        """None: what PEFT was told."""
        if not self._modules:
            return
        now = vars(self._modules[0])["_active_adapter"]
        if not isinstance(now, _Active):
            self._own = [vars(m)["_active_adapter"] for m in self._modules]
        elif name is None:
            for module, own in zip(self._modules, self._own, strict=True):
                vars(module)["_active_adapter"] = own
        if name is not None and now is not (chosen := _CHOSEN.setdefault(name, _Active([name]))):
            for module in self._modules:
                vars(module)["_active_adapter"] = chosen


class WithAdapter:
    """An :class:`AgentModel` whose calls run with one of its adapters, or with "none"; all else is the model's."""

    def __init__(self, model: AgentModel, adapter: str):
        self.model_, self.adapter = model, adapter

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "model_":
            raise AttributeError(name)
        return getattr(self.model_, name)

    def read(
        self,
        trace: KVTrace,
        lengths: Lengths | Call,
        *,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        outputs: Sequence[tuple[int, int]] | None = None,
    ) -> Tensor:
        """See :meth:`AgentModel.read`."""
        call = lengths if isinstance(lengths, Call) else trace.open(lengths, outputs)
        call.adapter = self.adapter
        outputs = outputs if isinstance(lengths, Call) else None
        return self.model_.read(trace, call, input_ids=input_ids, inputs_embeds=inputs_embeds, outputs=outputs)

    def run(self, call: Call, *, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None) -> Tensor:
        """See :meth:`AgentModel.run`."""
        call.adapter = self.adapter
        return self.model_.run(call, input_ids=input_ids, inputs_embeds=inputs_embeds)
