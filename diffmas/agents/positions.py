"""Positions a model was made for (`max_position_embeddings`): rows beyond them are told once, or refused."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from diffmas.agents.costs import Lengths, Plan
from diffmas.agents.trajectory import Trajectory
from diffmas.models.errors import UnsupportedModelError
from diffmas.models.geometry import keys_at
from diffmas.models.rotation import configured

_logger = logging.getLogger(__name__)
_TOLD = "_told_about_positions"


def position_limit(model: PreTrainedModel) -> int | None:
    """How many positions the model's configuration says it was made for; None where it says nothing.

    With scaled rotary positions, the original number times the factor, where that is more.
    """
    config = model.config.get_text_config(decoder=True)
    limit = configured(config, "max_position_embeddings")
    rope = getattr(config, "rope_parameters", None) or {}
    original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
    return limit if limit is None or not original or not factor else max(limit, int(original * factor))


def row_positions(trajectory: Trajectory, prompts: Sequence[int], answer: int, model: str | None = None) -> int:
    """Positions that a row with these prompt lengths, by agent, and this answer takes in its longest trace.

    `model`: of that model's traces, by the topology's name for it; None: of all.
    """
    plan = Plan.of(trajectory.topology, trajectory.latent_steps, [[n] for n in prompts], [answer])
    return max(columns for columns, name in zip(plan.columns, plan.models, strict=True) if model in (name, None))


def longest_row(trajectory: Trajectory, prompt_lengths: Sequence[Lengths], answers: Lengths, model: str) -> int:
    """The most positions that one of the rows takes in a trace of `model`."""
    rows = zip(zip(*prompt_lengths, strict=True), answers, strict=True)
    return max((row_positions(trajectory, prompts, answer, model) for prompts, answer in set(rows)), default=0)


def check_rows(trajectory: Trajectory, prompt_lengths: Sequence[Lengths], answers: Lengths, what: str) -> None:
    """:func:`check_positions` of the rows, for all models."""
    for name, model in trajectory.models.items():
        check_positions(model.language_model, longest_row(trajectory, prompt_lengths, answers, name), what)


def check_positions(model: PreTrainedModel, positions: int, what: str) -> None:
    """Warn, once a model, where `what` takes more `positions` than it was made for.

    Raises:
        UnsupportedModelError: the model has no code for the last of them.
    """
    limit = position_limit(model)
    if limit is None or positions <= limit or getattr(model, _TOLD, False):
        return
    _check_code(model, limit, positions, what)
    setattr(model, _TOLD, True)
    _logger.warning(
        "%s takes up to %d positions (all agents' prompts, latent steps and the answer), and the model was made for %d "
        "(max_position_embeddings): expect bad answers beyond them. What takes fewer: --max_prompt_tokens, "
        "--latent_steps, --max_new_tokens",
        what, positions, limit,
    )  # fmt: skip


def _check_code(model: PreTrainedModel, limit: int, positions: int, what: str) -> None:
    """Raise where the code of positions is a table that ends before, or repeats its end."""
    # The last ones it was made for and the next: far out, float32 itself cannot tell neighbours apart.
    inside = max(0, limit - 6)
    try:
        within, beyond = (_changing(model, at) for at in (inside, limit - 1))
        keys_at(model, positions - 1)
        ends = bool(within - beyond)
    except UnsupportedModelError:
        ends = True
    if ends:
        raise UnsupportedModelError(
            f"{what} takes {positions} positions, and the position code of {type(model).__name__} ends before; "
            f"allowed: up to {limit} (--max_prompt_tokens, --latent_steps, --max_new_tokens)"
        )


def _changing(model: PreTrainedModel, begin: int) -> set[int]:
    """Layers whose keys tell `begin` from the position behind it."""
    here, there = (keys_at(model, at) for at in (begin, begin + 1))
    pairs = enumerate(zip(here, there, strict=True))
    return {layer for layer, (a, b) in pairs if not torch.equal(a[:, :, 0], b[:, :, 0])}
