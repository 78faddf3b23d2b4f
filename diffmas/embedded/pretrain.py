"""Pre-train an embedded base: ``python -m diffmas.embedded.pretrain --architecture qwen3 --output DIR``.

The corpus is text in the chat format, drawn on the fly: evidence in the user's turn, then either values spelled out in
any order, or a question answered at once; further questions follow alone. Spelling out (`` B 12``) asks for a value
right behind its slot; that is learned first, and answering (``Recall B``) grows out of it. Bases that restate say the
evidence again, as it stands, before they spell it out. Same seed, thread count and machine: same weights.
"""

import argparse
import math
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch.nn.functional import cross_entropy
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from diffmas.embedded.tokenizer import LLAMA, NUMBERS, QWEN3, Dialect, build_tokenizer
from diffmas.prompts import Prompts
from diffmas.support.valid_json import to_json
from diffmas.tasks import relay

PROMPTS = Prompts.load(Path(relay.__file__).with_suffix(".yaml"))
VALUES = 16
QUESTIONS = 8


@dataclass(frozen=True)
class Base:
    """What one base has and another has not.

    Args:
        restates: it says the evidence again before it spells it out, as a sender does.
        sizes: those in which it differs from the first.
    """

    dialect: Dialect
    configuration: type
    kind: type[PreTrainedModel]
    restates: bool = False
    sizes: Mapping[str, Any] = field(default_factory=dict)


#: By their architecture.
BASES = {
    "qwen3": Base(QWEN3, Qwen3Config, Qwen3ForCausalLM),
    "llama": Base(
        LLAMA, LlamaConfig, LlamaForCausalLM, restates=True,
        sizes={"hidden_size": 48, "num_hidden_layers": 3, "intermediate_size": 144, "tie_word_embeddings": False},
    ),
}  # fmt: skip


def turn(role: str, row: dict[str, str], answer: str, dialect: Dialect) -> str:
    """A question and its answer as the chat template writes them."""
    return f"{dialect.user}{PROMPTS.messages(role, row)[-1]['content']}{dialect.assistant}{answer}{dialect.end}"


def conversation(rng: random.Random, dialect: Dialect = QWEN3, restates: bool = False) -> str:
    """Evidence over 2 … 16 slots in any order, and all that is asked about it."""
    slots = rng.sample(relay.SLOTS, rng.randint(2, len(relay.SLOTS)))
    if rng.random() < 0.5:
        slots.sort()
    row = relay.make_row(rng, slots, VALUES)
    pairs = [pair.groups() for pair in relay.PAIR.finditer(row["evidence"])]
    if rng.random() < 0.5:
        text = turn("single", row, row["answer"], dialect)
    else:
        again = f" {row['evidence']}" if restates else ""
        spelled = "".join(f" {slot} {value}" for slot, value in rng.choices(pairs, k=12))
        text = turn("sender", row, again + spelled, dialect)
    for _ in range(QUESTIONS):
        slot, value = rng.choice(pairs)
        text += turn("solver", {"question": relay.question(slot)}, value, dialect)
    return text


def make_model(tokenizer: PreTrainedTokenizerBase, architecture: str = "qwen3", **overrides) -> PreTrainedModel:
    """An untrained base, float32."""
    shape = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "intermediate_size": 192,
        "initializer_range": 0.05,
        "tie_word_embeddings": True,
    }
    base = BASES[architecture]
    return base.kind(
        base.configuration(
            vocab_size=len(tokenizer),
            max_position_embeddings=4096,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **{**shape, **base.sizes, **overrides},
        )
    )


def pretrain(
    model,
    tokenizer,
    steps: int,
    batch: int,
    learning_rate: float,
    rng: random.Random,
    draw=conversation,
    dialect: Dialect = QWEN3,
) -> dict[str, float]:
    """Train in place on the assistant's tokens of texts that `draw(rng)` gives.

    Returns the last steps' mean loss and accuracy on answers that are numbers.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 30, math.sin(math.pi / 2 * min(1.0, 3 * (1 - step / steps))))
    )
    assistant, end = tokenizer.convert_tokens_to_ids([dialect.assistant, dialect.end])
    answers = torch.tensor(tokenizer.convert_tokens_to_ids(list(NUMBERS)))
    state = {"loss": 0.0, "accuracy": 0.0}
    with Progress() as progress:
        bar = progress.add_task("pre-training", total=steps)
        for step in range(steps):
            texts = [draw(rng) for _ in range(batch)]
            ids = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").input_ids
            speaking = (ids == assistant).cumsum(1) > (ids == end).cumsum(1)
            target = ids[:, 1:][speaking[:, :-1]]
            hidden = model.model(ids, use_cache=False).last_hidden_state[:, :-1][speaking[:, :-1]]
            logits = model.lm_head(hidden)
            loss = cross_entropy(logits, target)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            is_answer = torch.isin(target, answers)
            accuracy = (logits.argmax(-1) == target)[is_answer].float().mean().item()
            state["loss"] += (loss.item() - state["loss"]) / 10
            state["accuracy"] += (accuracy - state["accuracy"]) / 10
            described = " ".join(f"{name} {value:.3f}" for name, value in state.items())
            progress.update(bar, advance=1, description=described)
            if step % 50 == 49:
                progress.console.print(step + 1, described)
    return state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write model and tokenizer to")
    parser.add_argument("--architecture", choices=BASES, default="qwen3", help="which of the bases")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="more or fewer change the rounding")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    began = time.perf_counter()
    base = BASES[args.architecture]
    dialect = base.dialect
    tokenizer = build_tokenizer(dialect)
    model = make_model(tokenizer, args.architecture)
    draw = partial(conversation, dialect=dialect, restates=base.restates)
    state = pretrain(
        model, tokenizer, args.steps, args.batch, args.learning_rate, random.Random(args.seed), draw, dialect
    )
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output, save_jinja_files=False)
    made = {
        "command": f"python -m diffmas.embedded.pretrain --architecture {args.architecture} "
        f"--output {args.output.name} --steps {args.steps} --batch {args.batch} "
        f"--learning-rate {args.learning_rate} --seed {args.seed} --threads {args.threads}",
        "parameters": model.num_parameters(),
        **{name: round(value, 4) for name, value in state.items()},
        "seconds": round(time.perf_counter() - began),
    }
    (args.output / "pretraining.json").write_text(to_json(made, indent=2) + "\n")


if __name__ == "__main__":
    main()
