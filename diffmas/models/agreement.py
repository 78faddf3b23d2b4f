"""Whether a model over a trace computes what it computes alone: a few tokens, before anything is built on it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from diffmas.models.errors import UnsupportedModelError
from diffmas.models.in_place import own_forwards
from diffmas.models.outline import attend_with, decoder_of, input_embedding
from diffmas.models.rotation import position_limits
from diffmas_ops import KVTrace, UnsupportedError

if TYPE_CHECKING:
    from diffmas.models.agent_model import AgentModel

#: Tokens of a short row and of a longer one, which must not meet, at most; and how many come in a second call.
_SHORT, _LONG, _GIVEN = 6, 24, 2
#: Where a model keeps what it was made of when it was read by its own code; and its states, until they agree.
_ALONE = "states_alone"
_FAILURES = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)


def states_alone(model: PreTrainedModel, made: str) -> list[Tensor] | None:
    """Hidden states `[tokens, hidden]` of a few rows, by the model's own code; None where they have agreed already.

    They stay with the model until they do, so that another attempt on it is compared with the same. `made`: what the
    model is made of.

    Raises:
        UnsupportedModelError: a model that cannot read them.
    """
    before, weights, states = vars(model).get(_ALONE, (None, None, None))
    now = _weights(model)
    if made == before and (states is None or weights == now):
        return states
    attended = model.config._attn_implementation
    with _looking_on(model), _named(model, "by itself"), own_forwards(model):
        # Other implementations may leave out what they lack: caps, in some versions.
        attend_with(model, "eager")
        try:
            rows = _tokens(model)
            states = [decoder_of(model)(input_ids=row[None], use_cache=False).last_hidden_state[0] for row in rows]
        finally:
            attend_with(model, attended)
    vars(model)[_ALONE] = (made, now, states)
    return states


def _weights(model: PreTrainedModel) -> list[tuple]:
    """What changes when other weights are loaded, or they are cast or moved."""
    return [(p.data_ptr(), 0 if p.is_inference() else p._version, p.dtype, p.device) for p in model.parameters()]


def check_agreement(model: AgentModel, made: str, alone: list[Tensor] | None, factor: float) -> None:
    """Read the same rows through a trace: in two calls, the second as a latent step is given.

    `made`, `alone`: what the model is made of, and its states by itself. `factor`: of embeddings that are given, as
    :func:`~diffmas.models.embedding.input_vectors` finds it.

    Raises:
        UnsupportedModelError: a model that cannot read them so, writes over them, or comes to something else.
    """
    base = model.language_model
    # What is not finite agrees with nothing: the first loss, or the first logits, are refused as that.
    if alone is None or not all(states.isfinite().all() for states in alone):
        if alone is not None:
            del vars(base)[_ALONE]
        return
    rows = _tokens(base)
    read, given = [len(row) - _GIVEN for row in rows], [_GIVEN] * len(rows)
    with _looking_on(base), _named(base, "through a trace"):
        capacity = max(map(len, rows))
        trace = KVTrace.allocate(batch=len(rows), capacity=capacity, backend=model.backend, **model.trace_sizes)
        prompts, rest = (
            torch.cat(parts) for parts in zip(*(row.tensor_split((-_GIVEN,)) for row in rows), strict=True)
        )
        first = model.read(trace, read, input_ids=prompts).split(read)
        inputs = input_embedding(base)(rest) * factor
        kept = inputs.clone()
        second = model.read(trace, given, inputs_embeds=inputs).split(given)
    if not torch.equal(inputs, kept):
        raise UnsupportedModelError(
            f"model {type(base).__name__} writes over inputs_embeds; a latent step's gradient needs them as they were"
        )
    expected = torch.cat(alone).double()
    states = torch.cat([part for row in zip(first, second, strict=True) for part in row])
    errors = (states.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    # In 16 bits a router may choose another expert for a token, by rounding alone.
    error, tolerance = (errors.max(), 1e-3) if states.dtype.itemsize > 2 else (errors.median(), 0.1)
    if not error <= tolerance:
        raise UnsupportedModelError(
            f"model {type(base).__name__} comes to something else through a trace than by itself (relative difference "
            f"{error:.1g} of its hidden states): it has positions, a mask or a state that a trace does not see, or "
            "mixes rows"
        )
    vars(base)[_ALONE] = (made, None, None)


def _tokens(model: PreTrainedModel) -> list[Tensor]:
    """The rows' tokens; none as far on as frequencies may change."""
    embedding = input_embedding(model)
    limit = min(position_limits(model.config.get_text_config(decoder=True)), default=_LONG)
    longer = max(_GIVEN + 2, min(_LONG, limit - 1))
    lengths = [min(_SHORT, longer - 1), longer]
    tokens = torch.arange(1, 1 + sum(lengths), device=embedding.weight.device) % embedding.num_embeddings
    return list(tokens.split(lengths))


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
    except (UnsupportedModelError, UnsupportedError, torch.OutOfMemoryError):
        raise
    except _FAILURES as error:
        raise UnsupportedModelError(
            f"model {type(model).__name__} cannot read a few tokens {how}: {type(error).__name__}: {error}"
        ) from error
