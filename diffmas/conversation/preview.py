"""One item as the agents of a training read it: their prompts token by token, and what the last one is taught."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from diffmas.agents.collator import Collator
from diffmas.agents.topology import AUTO, Agent, Topology
from diffmas.command_line import parse_training
from diffmas.generation.text import TextStream
from diffmas.models.pretrained import load_tokenizer
from diffmas.prompts.dates import print_date, today
from diffmas.prompts.shortened import cut_line, cut_summary
from diffmas.runs.description import known, read_description
from diffmas.runs.models import sources
from diffmas.runs.settings import SystemArguments
from diffmas.tasks import Item, TaskArguments, load_task

SPLITS = ("train", "eval")
#: Between tokens; around a control token; before a line break.
_BETWEEN, _CONTROL, _BREAK = "|", "⟦{}⟧", "⏎"
_LEGEND = "| between tokens; ⟦…⟧ control tokens; ⏎ before line breaks"
#: Of an item's field, so many characters are shown.
_SHOWN = 200


@dataclass
class ShowArguments:
    """Which item of what to show."""

    run: str | None = field(
        default=None, metadata={"help": "Folder written by diffmas.train, instead of the flags of a training."}
    )
    index: int = field(default=0, metadata={"help": "Which item, counted from 0."})
    split: str = field(default="train", metadata={"help": f"Of which items: {' or '.join(SPLITS)}."})


def show(args: ShowArguments, flags: Sequence[str], prog: str) -> int:
    """Print what `args` ask for; `flags` are those of a training, and `prog` complains of them. Returns 0.

    Raises:
        ValueError, OSError: a run, task, topology, model or item that cannot be had, named.
    """
    if args.split not in SPLITS:
        raise ValueError(f"split is {args.split!r}; allowed: {' or '.join(SPLITS)}")
    if args.run is None:
        system, task_args, _, _ = parse_training(flags, prog)
        topology = system.load_topology()
    else:
        description = read_description(args.run)
        system, task_args = known(SystemArguments, description["system"]), known(TaskArguments, description["task"])
        topology = Topology.from_dict(description["topology"])
    task = load_task(replace(task_args, date=task_args.date or today()))
    prompts = task.prompts.with_roles(topology.prompts)
    items = getattr(task, args.split)
    if not 0 <= args.index < len(items):
        allowed = f"0 to {len(items) - 1}, the {args.split} items of {task.name}"
        raise ValueError(f"index is {args.index}; allowed: {allowed}")
    tokenizers = {
        name: load_tokenizer(source["model_name_or_path"], source["gguf_file"])
        for name, source in sources(system, topology).items()
    }
    tokenizer = tokenizers[topology.model_names[0]]
    print_date(tokenizer, prompts.date)
    collator = Collator(topology, prompts, tokenizer, tokenizers)
    console = Console(highlight=False, soft_wrap=True)
    for line in preview(collator, items[args.index], system.latent_steps):
        console.print(line)
    if shortened := cut_line(cut_summary(prompts)):
        console.print(shortened)
    return 0


def preview(collator: Collator, item: Item, latent_steps: int) -> Iterator[Text]:
    """Lines that say what the agents read of `item`, in their order, and what the last one is taught."""
    topology, tokenizer = collator.topology, collator.tokenizer
    batch = collator([item])
    for name, value in item.items():
        text = str(value)
        yield Text(f"{name}: {text if len(text) <= _SHOWN else text[:_SHOWN] + ' …'}")
    yield Text(_LEGEND, "dim")
    for agent, ids in zip(topology.agents, batch["prompt_ids"], strict=True):
        roles = ", ".join(message["role"] for message in collator.prompts.messages(agent.role, item))
        yield Text()
        own = collator.tokenizer_of(agent)
        yield _heading(f"{agent.name} reads", ids.tolist(), own, f"role {agent.role}; messages: {roles}")
        yield Text(_received(topology, agent, latent_steps), "dim")
        yield tokens_shown(ids.tolist(), own)
    yield Text()
    taught = batch["answer_ids"].tolist()
    yield _heading(f"{topology.last.name} is taught", taught, tokenizer)
    yield tokens_shown(taught, tokenizer)
    yield Text()
    steps = latent_steps * (len(topology.agents) - 1)
    read = sum(len(ids) for ids in batch["prompt_ids"])
    yield Text(f"altogether {read} prompt tokens, {steps} latent steps, {len(taught)} answer tokens")


def tokens_shown(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Text:
    """Tokens as text, with what is between and around them; a character of several tokens is shown at its last."""
    names, shown, stream = _control(tokenizer), Text(), TextStream(tokenizer, ())
    for place, token in enumerate(ids):
        if place:
            shown.append(_BETWEEN, "dim")
        if token in names:
            shown.append(_CONTROL.format(names[token]), "bold magenta")
            stream = TextStream(tokenizer, ())
        else:
            shown.append(stream.push(token).replace("\n", f"{_BREAK}\n"))
    return shown


def _heading(what: str, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, more: str = "") -> Text:
    control = sum(token in _control(tokenizer) for token in ids)
    count = f"{len(ids)} tokens, {control} of them control tokens"
    return Text(f"{what} {count}" + (f" ({more})" if more else ""), "bold")


def _received(topology: Topology, agent: Agent, latent_steps: int) -> str:
    senders, bridged = topology.attended(agent.name), topology.bridged(agent)
    behind = []
    if senders:
        full = topology.handover == "full"
        if not full and (sink := AUTO if topology.handover_sink == AUTO else topology.sink_of(agent)):
            count = "as many of the first tokens as the model rests on" if sink == AUTO else f"the first {sink} tokens"
            behind.append(f"{count} of {senders[0]}")
        behind.append(f"{'prompt and ' if full else ''}{latent_steps} latent steps of {', '.join(senders)}")
    if bridged:
        prompt = "the prompt's" if topology.bridge_states == "full" else "the prompt's last"
        behind.append(f"hidden states of {', '.join(bridged)}: {prompt}, and those of {latent_steps} latent steps each")
    return f"behind {', then '.join(behind) or 'nothing'}"


def _control(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Added tokens by number: those of the chat template, and those that a model writes itself."""
    return {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
