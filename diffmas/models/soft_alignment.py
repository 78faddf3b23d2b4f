"""The soft alignment: the next input is the embedding expected of the token that the model would say."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from diffmas.models.alignment import AlignmentOptions, clipped
from diffmas.models.embedding import proportional
from diffmas.models.errors import UnsupportedModelError
from diffmas.models.head import Head
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
            enters the model up to a factor.
    """

    def __init__(
        self, model: PreTrainedModel, head: Head, vectors: Tensor, options: AlignmentOptions, *, backend: str = "auto"
    ):
        """`vectors`: tokens as the model's input, `[vocab, hidden]`."""
        super().__init__()
        name = type(model).__name__
        if type(head.linear) is not nn.Linear:
            kind = f"{type(head.linear).__module__}.{type(head.linear).__name__}"
            raise UnsupportedModelError(
                f"model {name} has a head of type {kind}; alignment 'soft' allows: torch.nn.Linear, without an adapter"
            )
        embedding = input_embedding(model)
        embedding = getattr(embedding, "base_layer", embedding)
        weight, vocab = embedding.weight, head.linear.weight.shape[0]
        if len(vectors) != vocab:
            raise UnsupportedModelError(
                f"model {name} has {len(vectors)} input embeddings and a head for {vocab} tokens; alignment 'soft' "
                "allows: as many of one as of the other"
            )
        if options.alignment_top_k > vocab:
            raise ValueError(f"alignment_top_k is {options.alignment_top_k}; allowed: up to {vocab}, the vocabulary")
        self.options, self.backend = options, backend
        self._scale, self._cap = head.scale, head.cap
        # In a tuple: the model's modules are not this one's, and must not be saved or moved twice.
        self._modules_of_model = (head.linear, embedding)
        self._factor, self._vectors = 1.0, None
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
            return clipped(expected, hidden, self.options.latent_grad_clip)

    def _expected(self, hidden: Tensor) -> Tensor:
        linear, values = self._weights()
        out = expected_embedding(
            hidden.to(values.dtype), linear.weight, values, bias=linear.bias, temperature=self.temperature,
            scale=self._scale, softcap=self._cap, backend=self.backend,
        )  # fmt: skip
        return (out * self._factor).to(hidden.dtype)

    def _likeliest(self, hidden: Tensor) -> Tensor:
        """The same over the likeliest tokens alone, which are few enough to be gathered."""
        linear, values = self._weights()
        with torch.no_grad():
            chosen = linear(hidden.to(values.dtype)).topk(self.options.alignment_top_k).indices
        wide = torch.promote_types(values.dtype, torch.float32)
        logits = torch.einsum("nh,nkh->nk", hidden.to(wide), linear.weight[chosen].to(wide))
        logits = (logits if linear.bias is None else logits + linear.bias[chosen]) * self._scale
        logits = logits if self._cap is None else self._cap * torch.tanh(logits / self._cap)
        weights = (logits / self.temperature).softmax(-1)
        out = torch.einsum("nk,nkh->nh", weights.to(wide), values[chosen].to(wide))
        return (out * self._factor).to(hidden.dtype)

    def _weights(self) -> tuple[nn.Linear, Tensor]:
        """The head, and what stands for tokens as inputs, up to a factor."""
        linear, embedding = self._modules_of_model
        return linear, embedding.weight if self._vectors is None else self._vectors
