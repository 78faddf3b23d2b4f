"""Whom to talk to, and how answers are decoded."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class ChatArguments:
    """Whom to talk to; without a run, agents that were never trained to communicate (LatentMAS)."""

    run: str | None = field(default=None, metadata={"help": "Folder written by diffmas.train."})
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "aliases": ["--model"],
            "help": "Hub id, folder or .gguf file of a causal language model, or smollm2; default: the run's own, or "
            "without --run the embedded base.",
        },
    )
    gguf_file: str | None = field(
        default=None, metadata={"help": "The model's file in that folder or repository, where it is in GGUF."}
    )
    topology: str | None = field(
        default=None, metadata={"help": "Without --run: agents; default: sequential, or relay for the embedded base."}
    )
    latent_steps: int | None = field(
        default=None, metadata={"help": "Without --run: latent steps m of every agent but the last; default: 10."}
    )
    prompts: str | None = field(
        default=None, metadata={"help": "YAML file of role prompts, or a built-in family; default: the task's own."}
    )
    once: list[str] | None = field(
        default=None,
        metadata={"help": "Ask this and leave: a question, or field=value for every field the role prompts need."},
    )
    seed: int = field(default=0, metadata={"help": "Of sampling."})
    max_new_tokens: int | None = field(default=None, metadata={"help": "Longest answer."})
    temperature: float | None = field(default=None, metadata={"help": "Sampling temperature; 0 is greedy."})
    top_p: float | None = field(default=None, metadata={"help": "Nucleus of sampling."})
    no_inspection: bool = field(default=False, metadata={"help": "The answer alone, not what it was made from."})
