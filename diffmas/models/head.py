"""From hidden states to logits: a model's head, and what the model makes of its result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import cast

import torch
from accelerate.hooks import AlignDevicesHook
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from diffmas.models.errors import UnsupportedModelError
from diffmas.models.lora import hooked, own_hooks_of, replaced
from diffmas.models.outline import decoder_of, replaced_forward
from diffmas_ops import few_rows_matmul

#: How configurations call a factor of logits, a divisor of logits, and a cap.
_FACTORS, _DIVISORS = ("logit_scale", "lm_head_multiplier"), ("logits_scaling",)
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_NAMES = (*_FACTORS, *_DIVISORS, *_CAPS)
#: The largest logits that a model's own are compared at: within any cap, around it, far beyond.
_PEAKS = (1.0, 30.0, 1000.0)


@dataclass(frozen=True)
class Head:
    """`z = scale · linear(hidden)`, and `cap · tanh(z / cap)` where there is a cap: `[…, hidden]` to `[…, vocab]`.

    The one place where logits are made; :class:`~diffmas.models.loss.AnswerLoss` does the same a few tokens at a time.
    """

    linear: nn.Module
    scale: float = 1.0
    cap: float | None = None
    #: Where scale and cap were found, and what it said of them then.
    config: PreTrainedConfig | None = None
    said: Mapping[str, float | None] = field(default_factory=dict)

    def check(self) -> None:
        """Raise `UnsupportedModelError` where the configuration says something else of logits than it did.

        Some models read it in every call and others once: what this one does now is not known.
        """
        if not self.said:
            return
        now = vars(self.config)
        for name, before in self.said.items():
            if (value := now.get(name)) != before:
                raise UnsupportedModelError(
                    f"the model's configuration has {name} {value!r}, and had {before!r} when the system was made; "
                    "allowed: the same, or a new system"
                )

    def __call__(self, hidden: Tensor) -> Tensor:
        self.check()
        logits = self._product(hidden)
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def _product(self, hidden: Tensor) -> Tensor:
        """Few rows, a decoding step's, read the weight at the memory's speed on the CPU; PyTorch's product does not."""
        few = hidden.dim() == 2 and hidden.device.type == "cpu" and not torch.is_grad_enabled()
        if not few or torch.is_autocast_enabled("cpu") or more_than_weights(self.linear) is not None:
            return self.linear(hidden)
        weight, bias = cast(Tensor, self.linear.weight), cast("Tensor | None", self.linear.bias)
        if weight.dtype != hidden.dtype:
            return self.linear(hidden)
        logits = few_rows_matmul(hidden, weight, True)
        return logits if bias is None else logits + bias


def more_than_weights(head: nn.Module, *, watched: bool = True) -> str | None:
    """Why `head` may not be computed from its weight and bias without being run; None where it may.

    `watched`: whether hooks of all modules (which count or profile) forbid it too.
    """
    if type(head) is not nn.Linear:
        return f"the model's head is a {type(head).__module__}.{type(head).__name__}, not a torch.nn.Linear"
    # What accelerate does to have a weight and its inputs on one device changes nothing where they are.
    hook = vars(head).get("_hf_hook")
    if replaced(head) or not (hook is None or type(hook) is AlignDevicesHook):
        return "the model's head has a forward that was put in place of its own"
    if any(own_hooks_of(head)) or (watched and hooked(head)):
        return "the model's head has hooks"
    weight = head._parameters.get("weight")
    if weight is None:
        return "the model's head has a weight that is no parameter"
    if isinstance(weight, DTensor):
        return "the model's head is sharded"
    if weight.is_meta:
        return "the model's head is offloaded"
    return None


@torch.no_grad()
def head_of(model: PreTrainedModel) -> Head:
    """The head of `model`, whose scale and cap are those in its configuration that give the model's own logits.

    Raises:
        UnsupportedModelError: no head, or one whose logits the model changes in another way.
    """
    linear = model.get_output_embeddings()
    if linear is None:
        raise UnsupportedModelError(f"model {type(model).__name__} has no head (get_output_embeddings)")
    width = model.config.get_text_config(decoder=True).hidden_size
    directions = torch.randn(len(_PEAKS), width, generator=torch.Generator().manual_seed(0))
    directions = directions.to(model.device, model.dtype)
    try:
        logits = linear(directions)
    except RuntimeError as error:
        raise UnsupportedModelError(
            f"model {type(model).__name__} has a head that does not take its hidden states, of size {width}: {error}"
        ) from error
    highest = logits.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(model.dtype).tiny)
    hidden = directions * (highest.new_tensor(_PEAKS)[:, None] / highest).to(directions.dtype)
    own = _own_logits(model, hidden)
    for scale, cap in _described(model):
        if same_logits(Head(linear, scale, cap)(hidden), own):
            config = model.config.get_text_config(decoder=True)
            said = vars(config)
            return Head(linear, scale, cap, config, {name: said[name] for name in _NAMES if name in said})
    names = ", ".join(_NAMES)
    raise UnsupportedModelError(
        f"model {type(model).__name__} changes its head's logits in a way that is not supported; "
        f"allowed: a scale and a cap that its configuration names ({names})"
    )


def _described(model: PreTrainedModel) -> Iterator[tuple[float, float | None]]:
    """Scales and caps that the configuration speaks of, then none, since not every model uses what it has."""
    config = model.config.get_text_config(decoder=True)
    factors = [value for name in _FACTORS if (value := getattr(config, name, None))]
    divisors = [1 / value for name in _DIVISORS if (value := getattr(config, name, None))]
    caps = [value for name in _CAPS if (value := getattr(config, name, None))]
    return product([*factors, *divisors, 1.0], [*caps, None])


class _Output(MoeModelOutputWithPast):
    """A decoder's, without anything but hidden states."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def _own_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """What the model's own forward makes of `hidden [tokens, hidden]`, had its decoder ended with it."""
    output = _Output(last_hidden_state=hidden[None])
    ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
    with replaced_forward(decoder_of(model), lambda *args, **kwargs: output):
        try:
            return model(input_ids=ids, use_cache=False).logits[0]
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UnsupportedModelError(
                f"model {type(model).__name__} cannot be seen making logits of hidden states: {error}"
            ) from error


def same_logits(ours: Tensor, own: Tensor) -> bool:
    """Whether both, `[tokens, vocab]`, are the same up to rounding, each row on its own scale."""
    if ours.shape != own.shape:
        return False
    tolerance = max(2 * torch.finfo(ours.dtype).eps, 1e-3)
    ours, own = ours.double(), own.double()
    return bool(((ours - own).norm(dim=-1) <= tolerance * own.norm(dim=-1)).all())
