"""What tokens are when they enter a model's layers, and whether inputs that are no tokens enter in the same way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from diffmas.models.errors import UnsupportedModelError
from diffmas.models.outline import decoder_of, first_layer, input_embedding, replaced_forward

#: Tokens that are given to a model as ids and as embeddings.
_TOKENS = 8


@torch.no_grad()
def input_vectors(model: PreTrainedModel) -> tuple[Tensor, float]:
    """`[vocab, hidden]`: every token as `inputs_embeds` has to have it, with the scale its embedding module applies.

    Beside them, the factor among these by which the model itself multiplies what it looks up, but not what it is given
    (Falcon-H1). What it does to all embeddings later (another scale, a norm), it does to latent inputs too.

    Raises:
        UnsupportedModelError: a model whose layers get something else of a token than of its embedding.
    """
    embedding = input_embedding(model)
    # An adapter's own part is trained: what it adds does not count.
    embedding = getattr(embedding, "base_layer", embedding)
    plain = type(embedding) is nn.Embedding and embedding.max_norm is None
    vocab = torch.arange(embedding.weight.shape[0], device=embedding.weight.device)
    vectors = embedding.weight.detach() if plain else embedding(vocab)
    factor = _check_entry(model, vocab[:_TOKENS], vectors[:_TOKENS])
    return (vectors if factor == 1 else vectors * factor), factor


def initial(module: nn.Module) -> Any:
    """What an embedding or a head was before an adapter trained a copy of it (`modules_to_save`)."""
    return getattr(module, "original_module", module)


@torch.no_grad()
def initial_vectors(model: PreTrainedModel, vectors: Tensor, factor: float) -> Tensor:
    """:func:`input_vectors`, which are `vectors` and `factor`, of the embedding before a copy of it was trained."""
    embedding = input_embedding(model)
    if (original := initial(embedding)) is embedding:
        return vectors
    return original(torch.arange(original.weight.shape[0], device=original.weight.device)) * factor


def proportional(vectors: Tensor, weight: Tensor) -> bool:
    """Whether `vectors` are `weight` times a number, up to rounding; both `[vocab, hidden]`."""
    some, others = vectors[: 8 * _TOKENS].double(), weight.detach()[: 8 * _TOKENS].double()
    scale = (some * others).sum() / others.square().sum()
    return bool((some - scale * others).norm() <= 2 * torch.finfo(vectors.dtype).eps * some.norm())


def _check_entry(model: PreTrainedModel, ids: Tensor, vectors: Tensor) -> float:
    """The factor with which tokens given by their vectors enter the first layer as those given by their ids."""
    name = type(model).__name__
    if (layer := first_layer(model)) is None:
        raise UnsupportedModelError(f"model {name} has no list of layers; this is not supported")
    by_id = _entered(model, layer, input_ids=ids[None])
    described = getattr(model.config.get_text_config(decoder=True), "embedding_multiplier", None) or 1.0
    for factor in dict.fromkeys((1.0, float(described))):
        if _same(by_id, _entered(model, layer, inputs_embeds=vectors[None] * factor)):
            return factor
    raise UnsupportedModelError(
        f"model {name} gives its layers something else of a token than of its embedding, and a latent step has no "
        "token; this is not supported"
    )


def _same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(
        a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-2, atol=1e-5)
        for a, b in zip(left, right, strict=True)
    )


class _Entered(Exception):
    """The first layer has been reached."""


def _entered(model: PreTrainedModel, layer: nn.Module, **inputs: Tensor) -> list[Tensor]:
    """The tensors that the first layer gets of `inputs`."""
    seen: list[Tensor] = []

    def forward(*args: Any, **kwargs: Any) -> None:
        for value in (*args, *kwargs.values()):
            seen.extend(x for x in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(x, Tensor))
        raise _Entered

    with replaced_forward(layer, forward):
        try:
            decoder_of(model)(**inputs, use_cache=False)
        except _Entered:
            return seen
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            raise UnsupportedModelError(
                f"model {type(model).__name__} does not take {next(iter(inputs))} that are no tokens': {error}"
            ) from error
    raise UnsupportedModelError(f"model {type(model).__name__} does not run its first layer; this is not supported")
