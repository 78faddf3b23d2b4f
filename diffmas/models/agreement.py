"""Whether a model over a trace computes what it computes alone: a few tokens, before anything is built on it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from diffmas.models.attention import NAME
from diffmas.models.errors import UnsupportedModelError
from diffmas.models.outline import decoder_of, input_embedding
from diffmas_ops import KVTrace, UnsupportedError

if TYPE_CHECKING:
    from diffmas.models.agent_model import AgentModel

#: New tokens of two calls that follow each other.
_CALLS = (4, 2)
#: Where a model keeps its states until they have agreed.
_ALONE = "states_alone"
_FAILURES = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)


def states_alone(model: PreTrainedModel) -> Tensor | None:
    """Hidden states `[tokens, hidden]` of a few tokens, by the model's own code; None where they have agreed already.

    They stay with the model until they do: its attention is ours then, and another attempt on it is compared as well.

    Raises:
        UnsupportedModelError: a model that cannot read them.
    """
    if (before := model.config._attn_implementation) == NAME:
        return vars(model).get(_ALONE)
    with _looking_on(model), _named(model, "by itself"):
        # Other implementations may leave out what they lack: caps, in some versions.
        model.set_attn_implementation("eager")
        try:
            alone = decoder_of(model)(input_ids=_tokens(model)[None], use_cache=False).last_hidden_state[0]
        finally:
            model.set_attn_implementation(before)
    vars(model)[_ALONE] = alone
    return alone


def check_agreement(model: AgentModel, alone: Tensor | None, factor: float) -> None:
    """Read the same tokens through a trace: in two calls, the second as a latent step is given.

    `factor`: of embeddings that are given, as :func:`~diffmas.models.embedding.input_vectors` finds it.

    Raises:
        UnsupportedModelError: a model that cannot read them so, writes over them, or comes to something else.
    """
    # What is not finite agrees with nothing: the first loss, or the first logits, are refused as that.
    base = model.language_model
    if alone is None or not alone.isfinite().all():
        vars(base).pop(_ALONE, None)
        return
    with _looking_on(base), _named(base, "through a trace"):
        trace = KVTrace.allocate(batch=1, capacity=sum(_CALLS), backend=model.backend, **model.trace_sizes)
        parts = _tokens(base).split(_CALLS)
        first = model.read(trace, [_CALLS[0]], input_ids=parts[0])
        inputs = input_embedding(model.language_model)(parts[1]) * factor
        given = inputs.clone()
        states = torch.cat((first, model.read(trace, [_CALLS[1]], inputs_embeds=inputs)))
    if not torch.equal(inputs, given):
        raise UnsupportedModelError(
            f"model {type(base).__name__} writes over inputs_embeds; a latent step's gradient needs them as they were"
        )
    errors = (states.double() - alone.double()).norm(dim=-1) / alone.double().norm(dim=-1)
    # In 16 bits a router may choose another expert for a token, by rounding alone.
    error, tolerance = (errors.max(), 1e-3) if alone.dtype.itemsize > 2 else (errors.median(), 0.1)
    if not error <= tolerance:
        raise UnsupportedModelError(
            f"model {type(base).__name__} comes to something else through a trace than by itself (relative difference "
            f"{error:.1g} of its hidden states): it has positions, a mask or a state that a trace does not see"
        )
    del vars(base)[_ALONE]


def _tokens(model: PreTrainedModel) -> Tensor:
    embedding = input_embedding(model)
    return torch.arange(1, 1 + sum(_CALLS), device=embedding.weight.device) % embedding.num_embeddings


@contextlib.contextmanager
def _looking_on(model: PreTrainedModel) -> Iterator[None]:
    """Without gradient, in evaluation mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _named(model: PreTrainedModel, how: str) -> Iterator[None]:
    try:
        yield
    except (UnsupportedModelError, UnsupportedError):
        raise
    except _FAILURES as error:
        raise UnsupportedModelError(
            f"model {type(model).__name__} cannot read a few tokens {how}: {type(error).__name__}: {error}"
        ) from error
