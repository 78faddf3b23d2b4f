"""LoRA's linear layers as one autograd node each.

PEFT's forward is some ten small operations. On a latent step, one token a row, their overhead and their saved
intermediates cost more than the arithmetic.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from peft import PeftConfig
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules import module as everywhere
from transformers import PreTrainedModel

from diffmas.models.errors import UnsupportedModelError
from diffmas.models.in_place import replace_forward, replaced_by_others
from diffmas.models.outline import input_embedding
from diffmas_ops import few_rows_matmul

#: Kinds of adapters, by PEFT's names, that were compared: each makes of a token what it makes of it alone, in layers.
_TOKEN_BY_TOKEN = {
    "ADALORA", "ADAMSS", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA", "GRALORA", "HIRA",
    "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR", "LORA", "MISS", "OFT", "OSF", "PEANUT", "PSOFT", "RANDLORA", "ROAD",
    "SHIRA", "SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS", "UNILORA", "VBLORA", "VERA", "WAVEFT",
}  # fmt: skip
#: Of LoRA's variants, by their options, those of which that is true.
_LORA_VARIANTS = ("use_dora", "use_bdlora", "kasa_config")


def fuse_lora(model: nn.Module) -> None:
    """Run the LoRA layers inside `model` as one operation wherever they are plain.

    Base and inputs share a dtype; the adapter has the same or, over a bfloat16 or float16 base, float32. Its products
    are then float32, and each result is rounded once. A layer is left to PEFT, call by call, while it is anything
    else: adapters disabled, merged or several, dropout, a variant such as DoRA, a quantised or hooked base layer,
    other mixtures of dtypes, a float32 base under autocast. Parameters and checkpoints stay PEFT's own.
    """
    for module in model.modules():
        if type(module) is Linear and type(module.base_layer) is nn.Linear and not replaced_by_others(module):
            replace_forward(module, _forward)


def check_lora(model: PreTrainedModel) -> None:
    """Raise `UnsupportedModelError` for an adapter on the input embedding, or LoRA on a layer more than linear."""
    embedding = input_embedding(model)
    if isinstance(embedding, (BaseTunerLayer, TrainableTokensWrapper)):
        raise UnsupportedModelError(
            f"an adapter is on the input embedding ({type(embedding).__name__}), and a latent step has no token; "
            "allowed: other target_modules, or modules_to_save with the embedding"
        )
    for name, module in model.named_modules():
        if type(module) is Linear and more_than_linear(module.base_layer):
            raise UnsupportedModelError(
                f"LoRA is on {name}, a {type(module.base_layer).__name__}, whose forward is not that of a linear "
                "layer; allowed: other target_modules, or exclude_modules with it"
            )


def check_peft(model: nn.Module) -> None:
    """Raise `UnsupportedModelError` for what acts outside the layers of a model: adapters of PEFT, hooks on it."""
    for name, config in getattr(model, "peft_config", {}).items():
        if (what := _outside_layers(config)) is not None:
            raise UnsupportedModelError(
                f"adapter {name!r} is {what}; allowed: adapters inside the model's layers, such as LoRA"
            )
        kind = getattr(config.peft_type, "value", config.peft_type)
        if kind not in _TOKEN_BY_TOKEN:
            raise UnsupportedModelError(
                f"adapter {name!r} is of PEFT's kind {kind}, which is not known to do the same to a token in every "
                f"call; allowed: {', '.join(sorted(_TOKEN_BY_TOKEN))}"
            )
        for field in fields(config):
            variant = field.metadata.get("is_lora_variant") and getattr(config, field.name)
            if variant and field.name not in _LORA_VARIANTS:
                raise UnsupportedModelError(
                    f"adapter {name!r} is a {type(config).__name__} with {field.name}, which is not known to do the "
                    f"same to a token in every call; allowed: none or {', '.join(_LORA_VARIANTS)}"
                )
    _check_called(model)


def _outside_layers(config: PeftConfig) -> str | None:
    if config.is_prompt_learning:
        return f"a {type(config).__name__}, which puts learned tokens or keys in front of prompts"
    if getattr(config, "alora_invocation_tokens", None):
        return "an activated LoRA (alora_invocation_tokens), which begins at a token of the prompt"
    if getattr(config, "layer_replication", None):
        return f"a {type(config).__name__} with layer_replication, whose copies of layers have a configuration apart"
    return None


def _check_called(model: nn.Module) -> None:
    """Raise for what would be skipped around the decoder and the head, which agents call by themselves."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    around = () if base is model else (model, getattr(model, "base_model", model))
    for module in (*around, base):
        # A compiled model runs what it holds.
        module = getattr(module, "_orig_mod", module)
        found = {"a hook": any(own_hooks_of(module)), "a forward that was put in place of its own": replaced(module)}
        for what in (what for what, there in found.items() if there):
            raise UnsupportedModelError(
                f"{what} on {type(module).__name__} would not run: agents call its decoder and its head; allowed: on "
                "modules inside the decoder"
            )


def replaced(module: nn.Module) -> bool:
    """Whether the module's forward is another than its class's, apart from what places or compiles it."""
    own = vars(module)
    if "forward" not in own:
        return False
    forward = own["forward"]
    if (hook := own.get("_hf_hook")) is not None:
        if not type(hook).__module__.startswith("accelerate."):
            return True
        forward = own["_old_forward"]
    forward = getattr(forward, "_torchdynamo_orig_callable", forward)
    return getattr(forward, "__func__", None) is not type(module).forward


def more_than_linear(module: nn.Module) -> bool:
    """Whether `module` is a linear layer of a model's own with another forward, such as a router's."""
    kind = type(module)
    own = kind.__module__.startswith("transformers.models.") and kind.forward is not nn.Linear.forward
    return isinstance(module, nn.Linear) and own


@dataclass(frozen=True)
class LoraParts:
    """`y = x Wᵀ + bias + s (x Aᵀ) Bᵀ`; `a` and `b` are None in a layer without adapter."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor | None = None
    b: Tensor | None = None
    scaling: float = 1.0


def lora_parts(module: nn.Module, dtype: torch.dtype) -> LoraParts | None:
    """What a linear layer with or without LoRA computes in `dtype`, or None where it is not plain.

    The adapter may be of a wider dtype than a 16-bit layer.
    """
    if type(module) is nn.Linear:
        return None if _special(module, dtype) else LoraParts(module.weight, module.bias)
    if type(module) is not Linear or _special(base := module.base_layer, dtype) or module.merged:
        return None
    if module.disable_adapters:
        return LoraParts(base.weight, base.bias)
    names = module.active_adapters
    if not names:
        return LoraParts(base.weight, base.bias)
    if len(names) != 1 or (name := names[0]) not in module.lora_A or name in module.lora_variant:
        return None
    a, b = module.lora_A[name], module.lora_B[name]
    allowed = (dtype, torch.promote_types(dtype, torch.float32))
    dropout = module.lora_dropout[name]
    if type(dropout) is not nn.Identity or hooked(dropout) or "forward" in vars(dropout):
        return None
    if type(a) is not nn.Linear or type(b) is not nn.Linear or b.bias is not None or a.weight.dtype not in allowed:
        return None
    if any(hooked(x) or "forward" in vars(x) or "weight" not in x._parameters for x in (a, b)):
        return None
    return LoraParts(base.weight, base.bias, a.weight, b.weight, module.scaling[name])


#: Where PEFT keeps which of a module's adapters are active.
ACTIVE = "_active_adapter"


def lora_places(module: nn.Module) -> tuple[list[tuple[dict, str]], list[Collection]]:
    """Where :func:`lora_parts` looked when it found parts: entries it read, and collections that were empty."""
    base = module.base_layer if type(module) is Linear else module
    entries = [(base._parameters, "weight"), (base._parameters, "bias"), (vars(base), "forward")]
    empty = hooks_of(base)
    if base is module:
        return entries, empty
    entries += [(module._modules, "base_layer"), (vars(module), "_disable_adapters"), (vars(module), ACTIVE)]
    empty.append(module.merged_adapters)
    for name in module.active_adapters if not module.disable_adapters else ():
        a, b, dropout = module.lora_A[name], module.lora_B[name], module.lora_dropout[name]
        modules = (module.lora_A, module.lora_B, module.lora_dropout)
        entries += [*((holder._modules, name) for holder in modules), (module.lora_variant, name)]
        entries += [
            (module.scaling, name),
            *((vars(x), "forward") for x in (a, b, dropout)),
            (a._parameters, "weight"),
            (b._parameters, "weight"),
            (b._parameters, "bias"),
        ]
        empty += [*hooks_of(a), *hooks_of(b), *hooks_of(dropout)]
    return entries, empty


def _special(base: nn.Module, dtype: torch.dtype) -> bool:
    return (
        type(base) is not nn.Linear
        or base.weight.dtype != dtype
        or hooked(base)
        # Offloading puts a forward of its own in the layer's place.
        or "forward" in vars(base)
    )


_HOOKS_OF_ALL: list[Collection] = [
    everywhere._global_forward_hooks,
    everywhere._global_forward_pre_hooks,
    everywhere._global_backward_hooks,
    everywhere._global_backward_pre_hooks,
]


def hooked(module: nn.Module) -> bool:
    """Whether running the module does more than its forward."""
    return any(hooks_of(module))


def hooks_of(module: nn.Module) -> list[Collection]:
    """The collections that :func:`hooked` finds empty, or not: its own, and those of all modules."""
    return own_hooks_of(module) + _HOOKS_OF_ALL


def own_hooks_of(module: nn.Module) -> list[Collection]:
    """Those of the module alone."""
    return [module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks]


def _forward(self: Linear, x: Tensor, *args, **kwargs) -> Tensor:
    device = x.device.type
    rows = x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
    parts = None if args or kwargs else lora_parts(self, rows.dtype)
    if parts is None or parts.a is None:
        return Linear.forward(self, x, *args, **kwargs)
    with _without_autocast(x):
        return _LoraLinear.apply(rows, parts.weight, parts.bias, parts.a, parts.b, parts.scaling)


def _without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


def _add_product(out: Tensor, x: Tensor, y: Tensor, alpha: float = 1.0) -> Tensor:
    """`out += alpha x y`, rounded once where `x` and `y` are wider than `out`."""
    return out.addmm_(x, y, alpha=alpha) if out.dtype == x.dtype else out.add_(x @ y, alpha=alpha)


class _LoraLinear(torch.autograd.Function):
    """`y = x Wᵀ + bias + s (x Aᵀ) Bᵀ` with `x [..., in]`, `W [out, in]`, `A [r, in]`, `B [out, r]`.

    `A` and `B` may be wider than `x` and `W`: their products and gradients then are in their dtype.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scaling):
        rows = x.reshape(-1, x.shape[-1])
        low = rows.to(a.dtype) @ a.T
        y = few_rows_matmul(rows, weight, True) if bias is None else F.linear(rows, weight, bias)
        _add_product(y, low, b.T, scaling)
        ctx.save_for_backward(rows, low, weight, a, b)
        ctx.scaling = scaling
        # No view in autograd's eyes: a model may change its projections in place (clip_qkv).
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1]))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows, low, weight, a, b = ctx.saved_tensors
        need_x, need_weight, need_bias, need_a, need_b, _ = ctx.needs_input_grad
        shape = (*grad.shape[:-1], rows.shape[1])
        grad = grad.reshape(-1, grad.shape[-1])
        wide = grad.to(a.dtype)
        with _without_autocast(grad):
            # beta = 0 ignores what is added to: a scaled product in one operation.
            grad_low = torch.addmm(low, wide, b, beta=0, alpha=ctx.scaling)
            return (
                _add_product(few_rows_matmul(grad, weight, False), grad_low, a).view(shape) if need_x else None,
                grad.T @ rows if need_weight else None,
                grad.sum(0) if need_bias else None,
                grad_low.T @ rows.to(a.dtype) if need_a else None,
                torch.addmm(b, wide.T, low, beta=0, alpha=ctx.scaling) if need_b else None,
                None,
            )
