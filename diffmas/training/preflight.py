"""What a training will need is looked at before its first step: memory, and positions of its longest rows.

Lengths are first bounded by the bytes of the items' fields, which costs nothing; tokens are counted only where that
bound does not settle the question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffmas.agents.collator import Collator
from diffmas.agents.positions import check_positions, check_rows, longest_row, position_limit, row_positions
from diffmas.agents.room import available_bytes, check_decoding, column_bytes, gb
from diffmas.generation import Decoding
from diffmas.generation.received import batches
from diffmas.system import MultiAgentSystem
from diffmas.tasks.source import Items
from diffmas.training.batching import ItemLengths, autocast_dtype
from diffmas.training.memory import MemoryModel, calibrate, counted, plan_of

#: How far the fitted memory model may be off.
_TOLERANCE = 1.2
#: A trajectory takes at most so many times its counted memory; below that, it need not be fitted.
_COUNTED_SHARE = 100
#: Of items that are generated, so many are looked at.
_LOOKED_AT = 512


def length_bound(collator: Collator, items: Sequence[Mapping[str, Any]], answers: bool = True) -> list[int]:
    """Tokens of the longest prompt by agent, and of the longest answer, at most: a token is a byte or more."""
    agents, prompts = collator.topology.agents, collator.prompts
    if not len(items):
        return [0] * (len(agents) + 1)
    own = [lengths[0] for lengths in collator.encode_prompts([items[0]])["prompt_lengths"]]
    # What closes reasoning and ends an answer.
    frame = len(collator.encode_answers([{"answer": ""}])[0])
    fields = [prompts.fields(agent.role) for agent in agents]
    longest = [0] * (len(agents) + 1)
    # Items that are generated when they are looked at take time, and are much alike: some of them will do.
    drawn = not isinstance(items, (list, Items))
    for i in range(0, len(items), max(1, len(items) // _LOOKED_AT) if drawn else 1):
        item = items[i]
        sizes = [sum(_size(item.get(name)) for name in names) for names in fields]
        sizes.append(_size(item["answer"]) + _size(item.get("reasoning")) + frame if answers else 0)
        longest = [max(pair) for pair in zip(longest, sizes, strict=True)]
    return [a + b for a, b in zip([*own, 0], longest, strict=True)]


def adapter_copies(args) -> int:
    """How often a training keeps what it trains: weights and gradients, and two moments of Adam."""
    return 4 if getattr(args.optim, "value", args.optim) in ("adamw_torch", "adamw_torch_fused") else 2


def check_training_memory(
    system: MultiAgentSystem, args, rows: int, lengths: ItemLengths, bound: Sequence[int]
) -> None:
    """Raise `ValueError` where a micro-batch of the longest `rows` cannot fit; what is to blame is named.

    `bound`: as :func:`length_bound` finds it.
    """
    system.to(args.device)
    free = available_bytes(args.device)
    if args.memory_limit_gb is not None:
        free = min(free, 1e9 * args.memory_limit_gb)
    trained = sum(p.numel() * p.element_size() for p in system.parameters() if p.requires_grad)
    # Gradients, and the two moments of Adam.
    free -= trained * (adapter_copies(args) - 1)
    if free < 0:
        raise ValueError(f"gradients and optimizer of {trained / 1e6:.3g} MB of weights do not fit; allowed: a smaller "
                         "lora_r")  # fmt: skip
    autocast, rows = autocast_dtype(args), min(rows, lengths.count)
    bare = counted(system, autocast)

    def peak(model: MemoryModel, prompts, answers) -> float:
        return model.peak(plan_of(system, prompts, answers))

    *prompts, answer = ([n] * rows for n in bound)
    shortest = peak(bare, [[1] * rows for _ in prompts], [1] * rows)
    if shortest <= free and _COUNTED_SHARE * peak(bare, prompts, answer) <= free:
        return
    if shortest > free:
        _refuse(system, bare, [[1] * rows for _ in prompts], [1] * rows, free, args)
    prompts, answer = lengths.longest(rows)
    if peak(bare, prompts, answer) > free:
        _refuse(system, bare, prompts, answer, free, args, lengths)
    if _COUNTED_SHARE * peak(bare, prompts, answer) > free and not args.fsdp:
        fitted = calibrate(system, autocast)
        if peak(fitted, prompts, answer) > _TOLERANCE * free:
            _refuse(system, fitted, prompts, answer, free, args, lengths)


def check_training_positions(system: MultiAgentSystem, lengths: ItemLengths, bound: Sequence[int]) -> None:
    """Warn, or refuse, where the longest training row has more positions than the model was made for."""
    for name, model in system.models.items():
        limit = position_limit(model.language_model)
        if limit is not None and row_positions(system.trajectory, bound[:-1], bound[-1], name) > limit:
            *prompts, answers = zip(*lengths.rows, strict=True)
            longest = longest_row(system.trajectory, prompts, answers, name)
            check_positions(model.language_model, longest, "the longest training item")


def check_evaluation(system: MultiAgentSystem, collator: Collator, items, decoding: Decoding, batch_size: int) -> None:
    """Refuse an evaluation that cannot fit, and warn of positions, before the training it would follow."""
    *prompts, _ = length_bound(collator, items, answers=False)
    trajectory, fits = system.trajectory, True
    for name, model in system.models.items():
        limit = position_limit(model.language_model)
        longest = row_positions(trajectory, prompts, decoding.max_new_tokens, name)
        least = column_bytes(model) * row_positions(trajectory, prompts, 1, name) * len(prompts) + model.state_bytes
        fits &= least * decoding.max_rows <= available_bytes(model.device) and (limit is None or longest <= limit)
    if fits:
        return
    for indices in batches(len(items), batch_size):
        lengths = collator.encode_prompts([items[i] for i in indices])["prompt_lengths"]
        check_decoding(trajectory, lengths, decoding, all_rows=False)
        check_rows(trajectory, lengths, [decoding.max_new_tokens] * len(indices), "an answer of max_new_tokens")


def _refuse(system, model: MemoryModel, prompts, answers, free: float, args, lengths: ItemLengths | None = None):
    """Raise, naming what alone is too much: the longest item, the latent steps, or the rows together."""
    needed, steps = model.peak(plan_of(system, prompts, answers)), system.latent_steps
    one = [p[:1] for p in prompts]
    without_steps = model.peak(plan_of(system, one, answers[:1], latent_steps=0))
    alone = model.peak(plan_of(system, one, answers[:1]))
    if without_steps > free and lengths is not None:
        index, tokens = lengths.longest_item()
        what = f"training item {index + 1} takes {tokens} tokens (all agents' prompts and its answer)"
    elif alone > free:
        what, needed = f"latent_steps is {steps}", alone
    else:
        what = f"per_device_train_batch_size is {args.per_device_train_batch_size}"
    raise ValueError(f"{what}: a step needs {gb(needed)}, and {gb(free)} are free; allowed: what fits")


def _size(value: Any) -> int:
    text = value if isinstance(value, str) else str(value)
    return 0 if value is None else len(text) if text.isascii() else len(text.encode(errors="replace"))
