"""One system that answers one question at a time."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from transformers import PreTrainedTokenizerBase

from diffmas.agents.collator import Collator
from diffmas.agents.thinking import budget
from diffmas.agents.topology import load_topology
from diffmas.conversation.settings import ChatArguments
from diffmas.evaluation.inspection import Inspection, inspect
from diffmas.generation import Decoding
from diffmas.loading import load_run
from diffmas.prompts import Prompts
from diffmas.prompts.shortened import cut_line, cut_summary
from diffmas.runs.models import load_bases
from diffmas.runs.settings import SystemArguments
from diffmas.support.text_file import check_characters
from diffmas.system import MultiAgentSystem
from diffmas.tasks import TaskArguments, as_asked, load_task


class Chat:
    """One system that answers one question at a time.

    Attributes:
        fields: what its agents' prompts ask for, in the order of the agents.
    """

    def __init__(
        self, system: MultiAgentSystem, tokenizer: PreTrainedTokenizerBase, prompts: Prompts, decoding: Decoding
    ):
        self.system, self.tokenizer, self.decoding = system, tokenizer, decoding
        self._prompts = prompts
        self._collator = Collator(system.topology, prompts, tokenizer, system.other_tokenizers)
        self.fields = list(dict.fromkeys(f for a in system.topology.agents for f in prompts.fields(a.role)))

    def answer(self, item: dict[str, str]) -> Iterator[str]:
        """Pieces of the answer as they come; afterwards :meth:`inspect` looks at it."""
        check_characters(item, "what was asked")
        before = cut_summary(self._prompts)
        self._encoded = self._collator.encode_prompts([item])
        if (cut := cut_summary(self._prompts)) != before:
            print(f"({cut_line(cut)})", file=sys.stderr)
        for event in self.system.stream_tokens(**self._encoded, tokenizer=self.tokenizer, decoding=self.decoding):
            if event.text:
                yield event.text
            self._completion = event.completion

    def inspect(self) -> Inspection:
        """What the last answer was made from."""
        return inspect(self.system, **self._encoded, tokens=self._completion.tokens)


def load(args: ChatArguments) -> Chat:
    """The chat that `args` describes.

    Raises:
        ValueError, OSError, ModuleNotFoundError: a run, model, topology or prompts that cannot be had, named.
    """
    if args.run is not None:
        for name in ("topology", "latent_steps"):
            if (value := getattr(args, name)) is not None:
                raise ValueError(f"{name} is {value!r} beside run {args.run!r}; allowed: one of the two")
        run = load_run(args.run, args.model_name_or_path, args.gguf_file)
        system, tokenizer, defaults = run.system, run.tokenizer, run.decoding
        prompts = as_asked(Prompts.load(args.prompts), run.task) if args.prompts else system.prompts
    else:
        topology = load_topology(args.topology or ("sequential" if args.model_name_or_path else "relay"))
        given = SystemArguments(args.model_name_or_path, args.gguf_file)
        models, tokenizers = load_bases(given, topology)
        tokenizer = tokenizers[topology.model_names[0]]
        steps = 10 if args.latent_steps is None else args.latent_steps
        system = MultiAgentSystem(models, topology, tokenizer=tokenizers, latent_steps=steps, alignment="ridge")
        # What the embedded base knows, where it has prompts for all of these agents.
        relay = load_task(TaskArguments()).prompts if args.model_name_or_path is None else Prompts({})
        own = all(relay.has(agent.role) for agent in topology.agents)
        prompts = relay if own and args.prompts is None else Prompts.load(args.prompts or "reasoning")
        prompts = prompts.with_roles(topology.prompts)
        defaults = {"max_new_tokens": budget(prompts, topology, tokenizer)}
        if args.model_name_or_path is None:
            defaults = {"max_new_tokens": 4, "temperature": 0.0}
    changes = {k: v for k in ("max_new_tokens", "temperature", "top_p") if (v := getattr(args, k)) is not None}
    decoding = Decoding(**{**defaults, **changes, "seed": args.seed, "samples": 1})
    if torch.cuda.is_available():
        system.cuda()
    return Chat(system, tokenizer, prompts, decoding)
