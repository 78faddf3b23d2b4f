"""`python -m diffmas.chat --run DIR`: ask a system, watch it answer, and see what each agent contributed."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from diffmas.agents.collator import Collator
from diffmas.agents.topology import load_topology
from diffmas.command_line import Parser
from diffmas.evaluation.inspection import Inspection, inspect
from diffmas.generation import Decoding
from diffmas.loading import load_run
from diffmas.models.pretrained import load_base
from diffmas.prompts import Prompts
from diffmas.prompts.shortened import cut_line, cut_summary
from diffmas.support.failures import run_program
from diffmas.support.interrupts import raise_on_interrupt
from diffmas.support.text_file import check_characters
from diffmas.system import MultiAgentSystem
from diffmas.tasks import TaskArguments, as_asked, load_task
from diffmas.training.launch import check_alone

PROGRAM = "python -m diffmas.chat"
#: What takes less memory where it is smaller.
LOWER = "--latent_steps, --max_new_tokens, a shorter question"


@dataclass
class ChatArguments:
    """Whom to talk to; without a run, agents that were never trained to communicate (LatentMAS)."""

    run: str | None = field(default=None, metadata={"help": "Folder written by diffmas.train."})
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "aliases": ["--model"],
            "help": "Hub id or folder of a causal language model; default: the run's own, or without --run the "
            "embedded base.",
        },
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


class Chat:
    """One system that answers one question at a time.

    Attributes:
        fields: what its agents' prompts ask for, in the order of the agents.
    """

    def __init__(
        self, system: MultiAgentSystem, tokenizer: PreTrainedTokenizerBase, prompts: Prompts, decoding: Decoding
    ):
        self.system, self.tokenizer, self.decoding = system, tokenizer, decoding
        self._prompts, self._collator = prompts, Collator(system.topology, prompts, tokenizer)
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


def main(argv: Sequence[str] | None = None) -> int:
    """Ask and answer until the end of the input. Returns the process's exit status."""
    raise_on_interrupt()
    parser = Parser(ChatArguments, prog=PROGRAM, description=__doc__)
    args, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return run_program(PROGRAM, lambda: _talk(args), lower=LOWER)


def _talk(args: ChatArguments) -> int:
    console = Console(highlight=False)
    check_alone("chat")
    chat = load(args)
    if args.once is not None:
        _show(chat, _item(args.once, chat.fields), console, args)
        return 0
    console.print(f"{_description(chat)}\nCtrl-D leaves.", markup=False)
    while True:
        try:
            item = _ask(chat.fields, console)
        except EOFError:
            console.print()
            return 0
        try:
            check_characters(item, "what was asked")
        except ValueError as error:
            print(error, file=sys.stderr)
            continue
        _show(chat, item, console, args)


def load(args: ChatArguments) -> Chat:
    """The chat that `args` describes.

    Raises:
        ValueError, OSError, ModuleNotFoundError: a run, model, topology or prompts that cannot be had, named.
    """
    if args.run is not None:
        for name in ("topology", "latent_steps"):
            if (value := getattr(args, name)) is not None:
                raise ValueError(f"{name} is {value!r} beside run {args.run!r}; allowed: one of the two")
        run = load_run(args.run, args.model_name_or_path)
        system, tokenizer, defaults = run.system, run.tokenizer, run.decoding
        family = args.prompts or run.task.prompts
        prompts = as_asked(Prompts.load(family), run.task) if family else load_task(run.task).prompts
    else:
        topology = load_topology(args.topology or ("sequential" if args.model_name_or_path else "relay"))
        model, tokenizer = load_base(args.model_name_or_path)
        steps = 10 if args.latent_steps is None else args.latent_steps
        system = MultiAgentSystem(model, topology, latent_steps=steps, alignment="ridge")
        # What the embedded base knows, where it has prompts for all of these agents.
        relay = load_task(TaskArguments()).prompts if args.model_name_or_path is None else Prompts({})
        own = all(relay.has(agent.role) for agent in topology.agents)
        prompts = relay if own and args.prompts is None else Prompts.load(args.prompts or "reasoning")
        prompts = prompts.with_roles(topology.prompts)
        defaults = {} if args.model_name_or_path else {"max_new_tokens": 4, "temperature": 0.0}
    changes = {k: v for k in ("max_new_tokens", "temperature", "top_p") if (v := getattr(args, k)) is not None}
    decoding = Decoding(**{**defaults, **changes, "seed": args.seed, "samples": 1})
    if torch.cuda.is_available():
        system.cuda()
    return Chat(system, tokenizer, prompts, decoding)


def _description(chat: Chat) -> str:
    topology = chat.system.topology
    agents = ", ".join(agent.name for agent in topology.agents)
    return f"{topology.name}: {agents}; {chat.system.latent_steps} latent steps each, hand-over {topology.handover}."


def _item(words: Sequence[str], fields: Sequence[str]) -> dict[str, str]:
    """`field=value` words, or one question where one field is left.

    Raises:
        ValueError: a field that no prompt asks for, or one that is missing.
    """
    item, plain = {}, []
    for word in words:
        name, sign, value = word.partition("=")
        if sign and name.strip() in fields:
            item[name.strip()] = value.strip()
        else:
            plain.append(word)
    missing = [f for f in fields if f not in item]
    if plain and len(missing) == 1:
        item[missing[0]] = " ".join(plain)
        missing = plain = []
    if missing or plain:
        got = ", ".join([*item, *(repr(word) for word in plain)])
        allowed = " ".join(f"{f}=…" for f in fields)
        raise ValueError(f"once has {got}; allowed: {allowed}, all that the agents' prompts ask for")
    return item


def _ask(fields: Sequence[str], console: Console) -> dict[str, str]:
    """Ask for every field; `field=value` fills in another one."""
    item: dict[str, str] = {}
    while missing := [f for f in fields if f not in item]:
        line = input(f"\n{missing[0]}> " if not item else f"{missing[0]}> ").strip()
        name, sign, value = line.partition("=")
        if sign and name.strip() in fields:
            item[name.strip()] = value.strip()
        elif line:
            item[missing[0]] = line
    return item


def _show(chat: Chat, item: dict[str, str], console: Console, args: ChatArguments) -> None:
    name = chat.system.topology.last.name
    print(f"{name}: ", end="", flush=True)
    empty = True
    for piece in chat.answer(item):
        print(piece, end="", flush=True)
        empty = False
    print("(nothing)" if empty else "")
    if not args.no_inspection:
        found = chat.inspect()
        console.print(_parts_table(found))
        if found.steps:
            console.print(_steps_table(found, chat.tokenizer))


def _parts_table(found: Inspection) -> Table:
    table = Table(title="Where the answer looked", title_justify="left")
    for column in ("agent", "part"):
        table.add_column(column)
    for column in ("columns", "attention", "lowest layer … highest"):
        table.add_column(column, justify="right")
    for part in found.parts:
        layers = f"{min(part.layers):.1%} … {max(part.layers):.1%}"
        table.add_row(escape(part.agent), part.kind, str(part.columns), f"{part.mass:.1%}", layers)
    return table


def _steps_table(found: Inspection, tokenizer: PreTrainedTokenizerBase) -> Table:
    table = Table(title="Latent steps as tokens", title_justify="left")
    table.add_column("agent")
    table.add_column("step", justify="right")
    table.add_column("would have said")
    table.add_column("nearest embeddings (cosine)")
    for step in found.steps:
        said, nearest = (
            escape(" ".join(f"{tokenizer.decode([token])!r} {value:{style}}" for token, value in pairs))
            for pairs, style in ((step.said, ".0%"), (step.nearest, ".2f"))
        )
        table.add_row(escape(step.agent) if step.step == 1 else "", str(step.step), said, nearest)
    return table


if __name__ == "__main__":
    sys.exit(main())
