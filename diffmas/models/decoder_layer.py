"""A decoder layer as one autograd node.

On the CPU a latent step's time is the reading of the weights, and what PyTorch, transformers and PEFT spend around some
hundred small operations. Here a layer is one operation forward and three backward, and keeps for the backward only what
cannot be computed again from it without a matrix product.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from diffmas.models.adapters import SwitchingLayer, switched
from diffmas.models.geometry import LayerGeometry
from diffmas.models.in_place import is_from, own_kind, put_in_front, replaced_by_others
from diffmas.models.layer_parts import GATES, LAYERS, LayerParts
from diffmas.models.lora import ACTIVE, hooked, hooks_of, lora_parts, lora_places
from diffmas_ops import Call, backends
from diffmas_ops.call import Outputs
from diffmas_ops.layer import Parameters, Parts, Saved, Turns
from diffmas_ops.native import CPU
from diffmas_ops.need import Need
from diffmas_ops.scores import Scores

_DTYPES = (torch.float32, torch.float64)
_OPERATORS = CPU.functions("decoder_layer")


def fuse_layers(model: PreTrainedModel) -> None:
    """Run the decoder layers inside `model` as one operation on the CPU, wherever they are plain.

    A layer is left to transformers and PEFT, call by call, while it is anything else: another device, dtype or
    architecture, modules inside of any other code than transformers' own, hooks, dropout, base weights that train, an
    adapter that :func:`~diffmas.models.lora.lora_parts` does not know. The last layer computes nothing but keys and
    values for tokens that are not among the call's `outputs`.
    """
    for module in model.modules():
        if own_kind(module).__name__ in LAYERS and _own_parts(module) is not None:
            kind: Any = type(module)
            # It knows a call's adapter itself: what switches modules is behind it.
            module.__class__ = put_in_front(FusedLayer, put_in_front(SwitchingLayer, kind))


class FusedLayer(nn.Module):
    """What :func:`fuse_layers` puts in front of a layer's class."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs) -> Tensor:
        layers, result = kwargs.get("trace_layers"), None
        if layers is not None and attention_mask is None and hidden_states.device.type == "cpu":
            index = self.self_attn.layer_idx
            geometry = layers[index]
            if geometry.is_plain and geometry.slot == index:
                call = kwargs["trace_call"]
                result = _fused_forward(self, hidden_states, *kwargs["position_embeddings"], call, geometry)
        return super().forward(hidden_states, attention_mask=attention_mask, **kwargs) if result is None else result


# Dynamo would specialise on the call handle and compile anew for every call; there is nothing to be fused in here.
@torch.compiler.disable
def _fused_forward(
    self: nn.Module, hidden_states: Tensor, cos: Tensor, sin: Tensor, call: Call, geometry: LayerGeometry
) -> Tensor | None:
    """The layer's result, or None where it has to be left alone."""
    layer = _plain(self, hidden_states, call, geometry)
    if layer is None or cos.shape[-1] != self.self_attn.head_dim:
        return None
    order, adapters = call.enter(layer.index), layer.operands.adapters
    if cos.dtype is not hidden_states.dtype:
        cos, sin = cos.to(hidden_states.dtype), sin.to(hidden_states.dtype)
    turns = Turns(cos[0], sin[0]) if layer.operands.rotates else _unturned(cos[0])
    if torch.is_grad_enabled() and any(t.requires_grad for t in (hidden_states, order, *adapters)):
        hidden, order = _DecoderLayer.apply(hidden_states[0], order, *turns, layer, *adapters)
    else:
        hidden = _run(hidden_states[0], turns, layer)[0]
    call.leave(layer.index, order)
    return hidden.unsqueeze(0)


def _unturned(like: Tensor) -> Turns:
    """Of heads that stay as they are; a row that stands for all."""
    one = like.new_ones(1, like.shape[1])
    return Turns(one.expand_as(like), torch.zeros_like(one).expand_as(like))


@dataclass(frozen=True)
class _Operands:
    """What was read of a layer, and the A and B among it.

    It stands for a layer of `kind` and tensors of `dtype` while `modules` are of `kinds`, `entries`, of dictionaries,
    hold the objects they held, and the collections `empty` are.
    """

    kind: type
    dtype: torch.dtype
    parameters: Parameters
    adapters: list[Tensor]
    rotates: bool
    softcap: float | None
    own: list[Tensor]
    modules: list[nn.Module]
    kinds: list[type]
    entries: list[tuple[Mapping, str, Any]]
    empty: list[Collection]

    def stand(self, layer: nn.Module, dtype: torch.dtype) -> bool:
        if type(layer) is not self.kind or dtype is not self.dtype or any(self.empty):
            return False
        return list(map(type, self.modules)) == self.kinds and all([h.get(key) is x for h, key, x in self.entries])

    def are_plain(self) -> bool:
        if torch.is_grad_enabled() and any([t.requires_grad for t in self.own]):
            return False
        dtype = self.dtype
        return all([t.dtype is dtype for t in self.own]) and all([t.dtype is dtype for t in self.adapters])


@dataclass(frozen=True)
class _Layer:
    """What of a layer and a call is no differentiable input of the node."""

    call: Call
    index: int
    scores: Scores
    operands: _Operands
    outputs: Outputs | None

    @property
    def output_index(self) -> Tensor | None:
        return None if self.outputs is None else self.outputs.index


def _plain(self: nn.Module, hidden: Tensor, call: Call, geometry: LayerGeometry) -> _Layer | None:
    """The layer and the call, or None where it has to be left alone."""
    dtype, attention = hidden.dtype, cast(Any, self.self_attn)
    if dtype not in _DTYPES or call.storage.dtype != dtype:
        return None
    # What insists on another backend of the operators gets it, from the model's own modules.
    if call.backend not in ("auto", "cpu") or call.attend is not None or torch.is_autocast_enabled("cpu"):
        return None
    of_adapters = _OPERANDS.setdefault(self, {})
    if (operands := of_adapters.get(call.adapter)) is None or not operands.stand(self, dtype):
        with switched(self, call.adapter):
            operands = _read(self, dtype, named=call.adapter is not None)
        if operands is None:
            return None
        of_adapters[call.adapter] = operands
    if not operands.are_plain():
        return None
    outputs = call.outputs if attention.layer_idx == call.storage.num_layers - 1 else None
    scores = Scores(attention.scaling, geometry.window, operands.softcap, geometry.chunk)
    return _Layer(call, attention.layer_idx, scores, operands, outputs)


#: What was read of layers by the adapter of a call: reading takes longer than a token's arithmetic in a small one.
_OPERANDS: WeakKeyDictionary[nn.Module, dict[str | None, _Operands]] = WeakKeyDictionary()


def _read(self: nn.Module, dtype: torch.dtype, named: bool) -> _Operands | None:
    """`named`: by a call, whatever adapter is active between calls."""
    if backends.refusal("cpu", Need("decoder_layer", "cpu", dtype)) is not None:
        return None
    if (parts := _own_parts(self)) is None:
        return None
    attention, mlp = cast(Any, self.self_attn), cast(Any, self.mlp)
    places = _norm_places(self, parts)
    norms = [getattr(*place) for place in places]
    places += [(attention, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    places += [(mlp, name) for name in ("gate_proj", "up_proj", "down_proj")]
    linears = [getattr(*place) for place in places[len(norms) :]]
    places += [(self, "self_attn"), (self, "mlp"), (mlp, "act_fn")]
    modules = (attention, mlp, mlp.act_fn, *linears)
    inside = (*modules, *norms)
    if any(hooked(m) for m in inside) or any(replaced_by_others(m) for m in modules) or _dropout(attention):
        return None
    if not all("weight" in n._parameters for n in norms):  # computed anew in every forward
        return None
    epsilon = getattr(norms[0], parts.epsilon)
    # Whoever replaced a norm's forward may have replaced it by the same in another precision.
    if not all(_is_norm(n, epsilon, parts.norm_offset) for n in norms if replaced_by_others(n)):
        return None
    read = [lora_parts(linear, dtype) for linear in linears]
    if None in read or any(getattr(n, parts.epsilon) != epsilon for n in norms):
        return None
    inside += tuple(linear.base_layer for linear in linears if isinstance(linear, Linear))
    entries: list[tuple[Mapping, str]] = [(holder._modules, name) for holder, name in places]
    entries += [(vars(m), "forward") for m in inside]
    entries += [place for n in norms for place in ((n._parameters, "weight"), (vars(n), parts.epsilon))]
    entries += [(vars(kind), "forward") for kind in {own_kind(self), *map(type, inside)}]
    entries += [(vars(attention), _DROPOUT), (_code_of(type(attention)), _ROTARY)]
    numbers = ((attention, parts.rotates), (attention, parts.softcap), (self, parts.residual_scale))
    entries += [(vars(holder), name) for holder, name in numbers if name]
    rotates, softcap, residual_scale = (getattr(holder, name) if name else None for holder, name in numbers)
    empty = [hooks for m in inside for hooks in hooks_of(m)]
    for linear in linears:
        more, collections = lora_places(linear)
        entries += [place for place in more if not (named and place[1] == ACTIVE)]
        empty += collections
    form = Parts(parts.norm_offset, *GATES[type(mlp.act_fn)], 1.0 if residual_scale is None else residual_scale)
    none = norms[0].weight.new_empty(0)
    weights = [norm.weight for norm in norms]
    groups = (parts.before, parts.head_norms, parts.behind)[: 3 if parts.behind else 2]
    given = iter(weights)
    parameters = Parameters(
        [next(given) if names else none for names in groups for _ in range(2)],
        epsilon,
        [p.weight for p in read],
        [none if p.bias is None else p.bias for p in read] if any(p.bias is not None for p in read) else [],
        [_or_empty(p.a, 0, p.weight.shape[1], none) for p in read],
        [_or_empty(p.b, p.weight.shape[0], 0, none) for p in read],
        [p.scaling for p in read],
        () if form == Parts() else form,
    )
    adapters = [t for p in read if p.a is not None for t in (p.a, p.b)]
    own = [*weights, *(p.weight for p in read), *(p.bias for p in read if p.bias is not None)]
    if not all(_is_readable(t) for t in (*own, *adapters)):
        return None
    turned = parts.rotates is None or bool(rotates)
    # Those of all modules came with each.
    empty = list({id(hooks): hooks for hooks in empty}.values())
    return _Operands(
        type(self), dtype, parameters, adapters, turned, softcap, own,
        list(inside), list(map(type, inside)), [(d, key, d.get(key)) for d, key in entries], empty,
    )  # fmt: skip


def _own_parts(layer: Any) -> LayerParts | None:
    """What the layer is made of, or None where it, or what is inside, is not of one of transformers' own files.

    Whose code may be another's says nothing of what it computes by what it computes now: a gate may begin at zero.
    """
    kind = own_kind(layer)
    parts, origin = LAYERS.get(kind.__name__), kind.__module__
    if parts is None or not origin.startswith("transformers.models."):
        return None
    if not all(is_from(k, origin) for k in (kind, type(layer.self_attn), type(layer.mlp))):
        return None
    if getattr(_code_of(kind).get(_ROTARY), "__module__", None) != origin or type(layer.mlp.act_fn) not in GATES:
        return None
    return parts if all(is_from(type(getattr(*place)), origin) for place in _norm_places(layer, parts)) else None


def _norm_places(layer: Any, parts: LayerParts) -> list[tuple[nn.Module, str]]:
    kinds = ((layer, parts.before), (layer.self_attn, parts.head_norms), (layer, parts.behind))
    return [(holder, name) for holder, names in kinds for name in names]


#: The attention's attribute for its dropout, and the function of its file that turns heads.
_DROPOUT, _ROTARY = "attention_dropout", "apply_rotary_pos_emb"


def _code_of(kind: type) -> Mapping[str, Any]:
    """What stands in the file of a class."""
    return vars(sys.modules[kind.__module__])


def _dropout(attention: nn.Module) -> float:
    return getattr(attention, _DROPOUT, 0.0)


@torch.no_grad()
def _is_norm(module: Any, epsilon: float, offset: float) -> bool:
    """Whether its forward has only the weight, and is an RMS norm's, up to rounding, on rows of several sizes."""
    weight, forward = module.weight, module.forward
    # What else it might hold may do nothing yet.
    held = [*module._parameters, *module._buffers, *module._modules]
    if held != ["weight"] or not isinstance(forward, MethodType) or forward.__closure__ or forward.__self__ != module:
        return False
    x = torch.randn(3, len(weight), generator=torch.Generator().manual_seed(0)).to(weight)
    x = x * torch.arange(1, 4).to(weight)[:, None]
    expected = x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt() * (offset + weight)
    return bool((module(x) - expected).norm() <= 1e-3 * expected.norm())


def _is_readable(x: Tensor) -> bool:
    """Whether it is what the operators take: numbers in memory, those of a row side by side."""
    return type(x) in (Tensor, nn.Parameter) and (x.shape[-1] <= 1 or x.stride(-1) == 1)


def _or_empty(x: Tensor | None, rows: int, columns: int, like: Tensor) -> Tensor:
    return like.new_empty(rows, columns) if x is None else x


def _run(h: Tensor, turns: Turns, layer: _Layer) -> tuple[Tensor, Saved]:
    call = layer.call
    queries = call if layer.outputs is None else layer.outputs
    return _OPERATORS.decoder_layer(
        h, turns, layer.operands.parameters, *call.storage.layer(layer.index),
        call.rows, layer.output_index, queries.rows, layer.scores,
    )  # fmt: skip


class _DecoderLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, order, cos, sin, layer, *adapters):
        result, saved = _run(h, Turns(cos, sin), layer)
        # The adapters are saved for the check that nobody has changed them since.
        ctx.save_for_backward(h, cos, sin, *saved, *adapters)
        ctx.layer = layer
        ctx.set_materialize_grads(False)
        return result, order.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        h, cos, sin, *rest = ctx.saved_tensors
        layer, turns, saved = ctx.layer, Turns(cos, sin), Saved(*rest[: len(Saved._fields)])
        parameters, index = layer.operands.parameters, layer.output_index
        # Only later calls may have used this one: its own result then owes nothing.
        grad = h.new_zeros(len(saved.q), h.shape[1]) if grad is None else grad.contiguous()
        grad_middle, grad_out, queries, *of_output = _OPERATORS.decoder_layer_backward_output(
            grad, turns, saved.of_output, parameters, index
        )
        attention = layer.call.gradients.backward(
            layer.call, layer.index, grad_out, queries, saved.out, saved.lse, layer.scores, outputs=layer.outputs
        )
        grad_h, *of_input = _OPERATORS.decoder_layer_backward_input(
            *attention, grad_middle, h, turns, saved.of_input, parameters, index
        )
        return grad_h, None, None, None, None, *of_input, *of_output
