"""The soft alignment: the next input is the embedding expected of the token that the model would say."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from diffmas.models.alignment import AlignmentOptions, clipped
from diffmas.models.embedding import proportional
from diffmas.models.errors import UnsupportedModelError
from diffmas.models.head import Head, more_than_weights
from diffmas.models.outline import input_embedding
from diffmas_ops import expected_embedding


class SoftAlignment(nn.Module):
    """Maps the last hidden state to the next input embedding: `e = softmax(z / T) Wᵢ`, z the head's logits of h.

    Logits have the head's bias, scale and cap; Wᵢ are tokens as the model's input, with the scale of its embedding
    module. e is as long as it comes out: an average of inputs that the model knows. Both weights are the model's own,
    as they are at the time, and take gradient where they train.

    Attributes:
        log_factor: where T is learned, the logarithm of what it has grown by, `[1]`: 0 at the start, which weight decay
            pulls to.

    Raises:
        ValueError: `alignment_top_k` beyond the vocabulary.
        UnsupportedModelError: a head that is more than a linear layer, or an embedding that trains and is not what
            enters the model up to a factor; at construction or in a call.
    """

    def __init__(
        self, model: PreTrainedModel, head: Head, vectors: Tensor, options: AlignmentOptions, *, backend: str = "auto"
    ):
        """`vectors`: tokens as the model's input, `[vocab, hidden]`."""
        super().__init__()
        name = type(model).__name__
        self.options, self.backend = options, backend
        embedding = input_embedding(model)
        plain = getattr(embedding, "base_layer", embedding)
        # In a tuple: the model's modules are not this one's, and must not be saved or moved twice.
        self._of_model = (model, embedding, plain, head)
        # transformers takes longer to find them than a call may.
        self._paths = _path(model, embedding), _path(model, head.linear)
        self._hooks = _hooks(embedding)
        weight = plain.weight
        self._factor, self._vectors = 1.0, None
        self._checked(head.linear, vectors)
        if weight.shape != vectors.shape or not proportional(vectors, weight):
            if weight.requires_grad:
                raise UnsupportedModelError(
                    f"model {name} makes more of its embedding than a multiple, and trains it; alignment 'soft' "
                    "allows: a frozen one"
                )
            self.register_buffer("_vectors", vectors.clone(), persistent=False)
        elif vectors.data_ptr() != weight.data_ptr():
            wide = weight.detach().double()
            self._factor = float((vectors.double() * wide).sum() / wide.square().sum())
        if options.trains:
            dtype = torch.promote_types(vectors.dtype, torch.float32)
            self.log_factor = nn.Parameter(torch.zeros(1, dtype=dtype, device=vectors.device))

    @property
    def temperature(self) -> float | Tensor:
        """T; `[1]` where it is learned."""
        start = self.options.alignment_temperature
        return start * self.log_factor.exp() if self.options.trains else start

    def forward(self, hidden: Tensor) -> Tensor:
        """`[rows, hidden]` to `[rows, hidden]`, in the dtype of `hidden`."""
        expected = self._likeliest if self.options.alignment_top_k else self._expected
        with torch.autocast(hidden.device.type, enabled=False):
            return clipped(expected, hidden, self.options.grad_clip)

    def _expected(self, hidden: Tensor) -> Tensor:
        head, linear, values = self._now()
        out = expected_embedding(
            hidden.to(values.dtype), linear.weight, values, bias=linear.bias, temperature=self.temperature,
            scale=head.scale, softcap=head.cap, backend=self.backend,
        )  # fmt: skip
        return (out * self._factor).to(hidden.dtype)

    def _likeliest(self, hidden: Tensor) -> Tensor:
        """The same over the likeliest tokens alone, which are few enough to be gathered."""
        head, linear, values = self._now()
        with torch.no_grad():
            chosen = linear(hidden.to(values.dtype)).topk(self.options.alignment_top_k).indices
        wide = torch.promote_types(values.dtype, torch.float32)
        logits = torch.einsum("nh,nkh->nk", hidden.to(wide), linear.weight[chosen].to(wide))
        logits = (logits if linear.bias is None else logits + linear.bias[chosen]) * head.scale
        logits = logits if head.cap is None else head.cap * torch.tanh(logits / head.cap)
        weights = (logits / self.temperature).softmax(-1)
        out = torch.einsum("nk,nkh->nh", weights.to(wide), values[chosen].to(wide))
        return (out * self._factor).to(hidden.dtype)

    def _now(self) -> tuple[Head, nn.Linear, Tensor]:
        """The head, its layer as it is now, and what stands for tokens as inputs, up to a factor."""
        (model, embedding, plain, head), (path, path_of_head) = self._of_model, self._paths
        if _at(model, path) is not embedding or _hooks(embedding) != self._hooks:
            raise UnsupportedModelError(
                f"model {type(model).__name__} has got another input embedding, or other hooks on it, since the system "
                "was made, and alignment 'soft' knows the one from then; allowed: a new system"
            )
        head.check()
        values = plain.weight if self._vectors is None else self._vectors
        return head, self._checked(_at(model, path_of_head), values), values

    def _checked(self, linear: Any, values: Tensor) -> nn.Linear:
        """The head's layer, which has to make logits of as many tokens as there are `values`, by its weights alone."""
        if (why := more_than_weights(linear, watched=False)) is not None:
            raise UnsupportedModelError(
                f"alignment 'soft' reads the head's weights, but {why}; allowed: a torch.nn.Linear by itself, without "
                "an adapter"
            )
        vocab, count = linear.weight.shape[0], values.shape[0]
        if vocab != count:
            raise UnsupportedModelError(
                f"model {type(self._of_model[0]).__name__} has {count} input embeddings and a head for {vocab} "
                "tokens; alignment 'soft' allows: as many of one as of the other"
            )
        if (most := self.options.alignment_top_k) > vocab:
            raise ValueError(f"alignment_top_k is {most}; allowed: up to {vocab}, the vocabulary")
        return linear


def _path(model: nn.Module, module: nn.Module) -> list[str]:
    return next(name for name, found in model.named_modules() if found is module).split(".")


def _at(model: nn.Module, path: list[str]) -> nn.Module | None:
    module: nn.Module | None = model
    for name in path:
        module = None if module is None else module._modules.get(name)
    return module


def _hooks(module: nn.Module) -> list[int]:
    """Its own hooks; transformers and PEFT have one that asks for gradients, and changes nothing."""
    found = {**module._forward_hooks, **module._forward_pre_hooks}
    return [key for key, hook in found.items() if not str(hook.__module__).startswith(("transformers.", "peft."))]
