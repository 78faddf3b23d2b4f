"""How a decoder's recurrent layers (linear attention, state spaces, short convolutions) go on with a trace.

What such a layer remembers of a row belongs to the row's trace (:class:`diffmas_ops.states.RecurrentStates`). A call's
packed rows are taken apart, rows of equal length run as a batch from the states they have, and the states they leave
behind keep their autograd history: gradients flow through all calls. The modules' own code computes; it finds the
states in what it takes for transformers' cache.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from diffmas.models.errors import UnsupportedModelError
from diffmas.models.in_place import replace_forward
from diffmas.models.keywords import carried, carry_keywords
from diffmas_ops.states import State

#: What configurations call layers that remember, some of them beside attention.
RECURRENT = ("linear_attention", "mamba", "conv", "hybrid")
#: Updates by one token, whose fast kernels write in place and have no gradient.
_SINGLE_STEPS = (
    "mamba_selective_state_update",
    "mamba2_selective_state_update",
    "torch_recurrent_gated_delta_rule",
    "recurrent_kimi_delta_attention",
)


def continue_states(model: PreTrainedModel) -> str:
    """Make the recurrent layers of `model` go on with the states of traces; what they are, empty where there are none.

    Raises:
        UnsupportedModelError: a layer whose own code does not continue its state, or does not keep it in
            transformers' cache.
    """
    found = [m for m in model.modules() if _keeps_states(_kind(m))]
    layers = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()
    recurrent = [kind for kind in layers if kind in RECURRENT]
    what = ", ".join(sorted(set(recurrent or (type(m).__name__ for m in found))))
    if layers and len(recurrent) != len(found):
        raise UnsupportedModelError(
            f"model {type(model).__name__} has recurrent layers ({what}) whose state is not in transformers' cache; "
            "this is not supported"
        )
    if any("forward" in vars(m) for m in found):
        return what
    for module in {type(m): m for m in found}.values():
        _choose_steps(module)
    one_by_one = {kind: _try(module, model) for kind, module in {type(m): m for m in found}.items()}
    carry_keywords(m for m in model.modules() if any(_keeps_states(_kind(child)) for child in m.children()))
    for mixer in found:
        replace_forward(mixer, _forward, one_by_one=one_by_one[type(mixer)])
    return what


def _kind(module: nn.Module) -> Any:
    return type(module)


@functools.cache
def _keeps_states(kind: Any) -> bool:
    """Whether modules of this class write their states to transformers' cache."""
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    return code is not None and "update_conv_state" in code.co_names


def _choose_steps(module: nn.Module) -> None:
    """Where gradients are recorded, update the state by PyTorch's own code: fast kernels have no gradient for that."""
    scope = vars(sys.modules[type(module).__module__])
    for name in _SINGLE_STEPS:
        function = scope.get(name)
        if hasattr(function, "__wrapped__") and not hasattr(function, "chosen"):
            scope[name] = _chosen(function)


def _chosen(function: Callable) -> Callable:
    @functools.wraps(function)
    def chosen(*args, **kwargs):
        limit = getattr(args[0] if args else None, "limit", None)
        if limit is not None:
            args, kwargs = _within(limit, *args, **kwargs)
        return (function.__wrapped__ if torch.is_grad_enabled() else function)(*args, **kwargs)

    vars(chosen)["chosen"] = True
    return chosen


def _within(limit: tuple[float, float], state: Tensor, hidden: Tensor, dt: Tensor, *args, **kwargs):
    """Arguments for an update by one token, with the limit that only the code for several tokens keeps to."""
    bias, softplus = kwargs.pop("dt_bias", None), kwargs.pop("dt_softplus", False)
    dt = dt if bias is None else dt + bias.to(dt.dtype)
    dt = (F.softplus(dt) if softplus else dt).clamp(*limit)
    return (state, hidden, dt, *args), kwargs


@torch.no_grad()
def state_bytes(model: PreTrainedModel) -> int:
    """Bytes of what the recurrent layers of `model`, as :func:`continue_states` left it, remember of one row."""
    total = 0
    for mixer in (m for m in model.modules() if _keeps_states(_kind(m))):
        weight = next(p for p in mixer.parameters() if p.is_floating_point())
        token = torch.zeros(1, 1, model.config.get_text_config(decoder=True).hidden_size, device=weight.device)
        _, state = _run_module(mixer, token.to(model.dtype), {})
        total += sum(x.numel() * x.element_size() for x in state.values())
    return total


def chunk_length(model: PreTrainedModel) -> int:
    """Tokens that recurrent layers take at a time: prompts are filled up to a multiple of it. 1 where they are not."""
    config = model.config.get_text_config(decoder=True)
    sizes = [getattr(config, name, None) for name in ("mamba_chunk_size", "chunk_size")]
    # What the delta rule's code takes, whatever the configuration.
    return next(filter(None, sizes), 64 if hasattr(config, "linear_conv_kernel_dim") else 1)


@torch.no_grad()
def _try(module: nn.Module, model: PreTrainedModel) -> bool:
    """Run three tokens at once, and one by one; whether code for several begins at zero, whatever the state."""
    if model.device.type == "meta":
        return False
    name = f"{type(module).__name__} of model {type(model).__name__}"
    generator, training = torch.Generator().manual_seed(0), module.training
    width = model.config.get_text_config(decoder=True).hidden_size
    x = torch.randn(1, 3, width, generator=generator).to(model.device, model.dtype)
    module.eval()
    try:
        whole, _ = _run_module(module, x, {})
        first, state = _run_module(module, x[:, :1], {})
        rest, _ = _run_each(module, x[:, 1:], state)
        # So far from where all begin that no one overlooks it.
        far = {k: 9 * torch.randn(v.shape, generator=generator).to(v) for k, v in state.items()}
        several, _ = _run_module(module, x[:, 1:], far)
        each, _ = _run_each(module, x[:, 1:], far)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedModelError(f"the state of {name} cannot be continued: {error}") from error
    finally:
        module.train(training)
    if not _agree(torch.cat((first, rest), 1), whole):
        raise UnsupportedModelError(f"{name} does not continue its state; this is not supported")
    return not _agree(several, each)


def _agree(actual: Tensor, expected: Tensor) -> bool:
    tolerance = 0.1 if expected.dtype.itemsize < 4 else 1e-3
    # What is not finite shows nothing.
    return not (actual - expected).float().norm() > tolerance * expected.float().norm()


@functools.cache
def _cache_name(kind: Any) -> str:
    names = inspect.signature(kind.forward).parameters
    return "cache_params" if "cache_params" in names else "past_key_values"


def _forward(
    self: nn.Module, hidden_states: Tensor, *, one_by_one: bool, attention_mask: Tensor | None = None, **kwargs
) -> Tensor:
    """`hidden_states [1, total, hidden]` of the packed rows of a call, to what the module makes of every row."""
    # Nothing has been chosen yet where the model was unpickled.
    _choose_steps(self)
    if (call := carried("trace_call")) is None:
        raise ValueError("trace_call is None; this model remembers through a trace: call it via MultiAgentSystem")
    if attention_mask is not None:
        raise ValueError("attention_mask is given; allowed: None, packed inputs need no mask")
    before = call.remembered(self.layer_idx)
    out, after = _run_rows(self, hidden_states[0], call.lengths, before, one_by_one)
    call.remember(self.layer_idx, before, after)
    return out.unsqueeze(0)


def _run_rows(
    module: nn.Module, hidden: Tensor, lengths: list[int], before: State, one_by_one: bool
) -> tuple[Tensor, State]:
    """`hidden [total, hidden]` of packed rows, every row from its own state."""
    if min(lengths) == max(lengths):
        out, after = _run(module, hidden.unflatten(0, (len(lengths), -1)), before, one_by_one)
        return out.flatten(0, 1), after
    outs, states = list(hidden.split(lengths)), [{k: x[row] for k, x in before.items()} for row in range(len(lengths))]
    for n in sorted(set(lengths) - {0}):
        rows = [row for row, length in enumerate(lengths) if length == n]
        state = {k: torch.stack([states[row][k] for row in rows]) for k in before}
        out, after = _run(module, torch.stack([outs[row] for row in rows]), state, one_by_one)
        for i, row in enumerate(rows):
            outs[row], states[row] = out[i], {k: x[i] for k, x in after.items()}
    # A row without a token yet stands where all begin: at zero.
    empty = {k: torch.zeros_like(x[0]) for k, x in after.items()}
    return torch.cat(outs), {k: torch.stack([state.get(k, zeros) for state in states]) for k, zeros in empty.items()}


def _run(module: nn.Module, hidden: Tensor, before: State, one_by_one: bool) -> tuple[Tensor, State]:
    """`hidden [rows, n, hidden]`, from the states and to those behind the last token.

    `one_by_one`: the module's code for several tokens begins at zero, whatever the state.
    """
    each = one_by_one and before and hidden.shape[1] > 1
    return (_run_each if each else _run_module)(module, hidden, before)


def _run_each(module: nn.Module, hidden: Tensor, before: State) -> tuple[Tensor, State]:
    outs = []
    for token in hidden.split(1, dim=1):
        out, before = _run_module(module, token, before)
        outs.append(out)
    return torch.cat(outs, 1), before


def _run_module(module: nn.Module, hidden: Tensor, before: State) -> tuple[Tensor, State]:
    cache = _Cache(before, getattr(module, "time_step_limit", None))
    kind = _kind(module)
    out = kind.forward(module, hidden, **{_cache_name(kind): cache})
    return out, cache.after()


class _Cache:
    """What a module takes for transformers' cache: the states it begins with, and those it leaves."""

    #: With it, a convolution leaves the state it begins with as it is.
    record_past = True

    def __init__(self, before: State, limit: tuple[float, float] | None):
        self._before, self._limit = before, limit
        self._written: State = {}
        self._lent: dict[str, _Lent] = {}

    def after(self) -> State:
        """The states as the module left them: in their places, or given."""
        return {name: lent.written for name, lent in self._lent.items()} | self._written

    def is_recording_past(self, layer_idx: int) -> bool:
        return self.record_past

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self._before.get(f"convolution {state_idx}")

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        name = f"recurrence {state_idx}"
        if name in self._before and name not in self._lent:
            self._lent[name] = self._before[name].clone().as_subclass(_Lent)
            self._lent[name].limit = self._limit
        return self._lent.get(name)

    def update_conv_state(self, states: Tensor, layer_idx: int, state_idx: int = 0, *, conv_kernel_size: int) -> Tensor:
        """`states [rows, channels, n]` behind those before; the last `conv_kernel_size` of them stay."""
        past = self.get_conv_state(layer_idx, state_idx)
        past = states.new_zeros(*states.shape[:-1], conv_kernel_size) if past is None else past
        whole = torch.cat((past, states), -1)
        # A view would keep all tokens, which checkpointing is there to let go of.
        self._written[f"convolution {state_idx}"] = whole[..., -conv_kernel_size:].clone()
        return whole

    def update_recurrent_state(self, state: Tensor, layer_idx: int, state_idx: int = 0) -> Tensor:
        self._written[f"recurrence {state_idx}"] = state
        return state

    # As earlier versions of transformers ask.

    def has_previous_state(self, layer_idx: int, state_idx: int = 0) -> bool:
        return bool(self._before)

    @property
    def layers(self) -> dict[int, _Cache]:
        return defaultdict(lambda: self)

    @property
    def conv_states(self) -> dict[int, Tensor | None]:
        return {0: self.get_conv_state(0)}

    @property
    def recurrent_states(self) -> dict[int, Tensor | None]:
        return {0: self.get_recurrent_state(0)}


class _Lent(Tensor):
    """A copy of a state that a module may write to; `limit`: of the time steps that the state advances by.

    A kernel writes in place. PyTorch's code does by `copy_`, after autograd has saved the state: that is kept apart.
    """

    __torch_function__: Any = torch._C._disabled_torch_function_impl
    limit: tuple[float, float] | None = None
    _copied: Tensor | None = None

    def copy_(self, source: Tensor) -> Tensor:
        self._copied = source
        return self

    @property
    def written(self) -> Tensor:
        return self.as_subclass(Tensor) if self._copied is None else self._copied
