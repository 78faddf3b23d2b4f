"""A conversation on the terminal: questions, the answer as it comes, and tables of what it was made from."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from diffmas.conversation.chat import Chat, load
from diffmas.conversation.settings import ChatArguments
from diffmas.evaluation.inspection import Inspection
from diffmas.support.launch import check_alone
from diffmas.support.text_file import check_characters
from diffmas.system import MultiAgentSystem


def talk(args: ChatArguments) -> int:
    """Ask and answer until the end of the input. Returns the process's exit status.

    Raises:
        ValueError, OSError, ModuleNotFoundError: a run, model, topology or prompts that cannot be had, named.
    """
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
            console.print(_steps_table(found, chat.system))


def _parts_table(found: Inspection) -> Table:
    table = Table(title="Where the answer looked", title_justify="left")
    for column in ("agent", "part"):
        table.add_column(column)
    for column in ("columns", "attention", "lowest layer … highest"):
        table.add_column(column, justify="right")
    for part in found.parts:
        layers = f"{min(part.layers):.1%} … {max(part.layers):.1%}"
        columns = str(part.columns) if part.columns else "–"
        table.add_row(escape(part.agent), part.kind, columns, f"{part.mass:.1%}", layers)
    return table


def _steps_table(found: Inspection, system: MultiAgentSystem) -> Table:
    """In the words of the model that thought them."""
    tokenizers = {agent.name: system.tokenizer_of(agent) for agent in system.topology.agents}
    table = Table(title="Latent steps as tokens", title_justify="left")
    table.add_column("agent")
    table.add_column("step", justify="right")
    table.add_column("would have said")
    table.add_column("nearest embeddings (cosine)")
    for step in found.steps:
        said, nearest = (
            escape(" ".join(f"{tokenizers[step.agent].decode([token])!r} {value:{style}}" for token, value in pairs))
            for pairs, style in ((step.said, ".0%"), (step.nearest, ".2f"))
        )
        table.add_row(escape(step.agent) if step.step == 1 else "", str(step.step), said, nearest)
    return table
