"""Models that reason before they answer: blocks that a chat template opens, and its switch for thinking."""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from diffmas.agents.topology import Topology
from diffmas.answers import reasoning
from diffmas.prompts import Prompts
from diffmas.prompts.chat_template import reads, render
from diffmas.support.failures import TEMPLATE_ERRORS

#: What chat templates call their switch: Qwen3, SmolLM3 and GLM; Granite and DeepSeek.
SWITCHES = ("enable_thinking", "thinking")
#: Longest answer where nothing else is asked for: of a model that thinks, and of one that does not.
THINKING_BUDGET, BUDGET = 32_768, 2_048


def own_options(prompts: Prompts, topology: Topology) -> Prompts:
    """Prompts with what the last agent has its chat template told."""
    return prompts.with_options(topology.last.chat_template_kwargs)


def closing(prompts: Prompts, tokenizer: PreTrainedTokenizerBase) -> str:
    """What stands between reasoning and answer where prompts end in a reasoning block; nothing where they do not.

    A template that breaks the line behind the opening tag gets line breaks around the closing one, as it writes them.
    """
    start = prompts.answer_start(tokenizer)
    tag = reasoning.opened(start)
    if tag is None:
        return ""
    return f"\n{tag}\n\n" if start.endswith("\n") else tag


def switch(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The option by which the chat template turns thinking on and off; None where it has none."""
    for name in SWITCHES:
        if reads(tokenizer, name) and _asked(tokenizer, {name: True}) != _asked(tokenizer, {name: False}):
            return name
    return None


def thinks(prompts: Prompts, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the model reasons before it answers, as far as its chat template says so."""
    if reasoning.opened(prompts.answer_start(tokenizer)) is not None:
        return True
    if (name := switch(tokenizer)) is None:
        return False
    options = prompts.chat_template_kwargs
    return _asked(tokenizer, options) != _asked(tokenizer, {**options, name: False})


def switched(topology: Topology, tokenizer: PreTrainedTokenizerBase, on: bool) -> Topology:
    """The same with thinking turned `on` or off for its last agent.

    Raises:
        ValueError: a chat template without a switch.
    """
    if (name := switch(tokenizer)) is None:
        raise ValueError(
            f"the model's chat template has no switch for thinking; allowed: one that reads {' or '.join(SWITCHES)}"
        )
    last = replace(topology.last, chat_template_kwargs={**topology.last.chat_template_kwargs, name: on})
    return replace(topology, agents=(*topology.agents[:-1], last))


def budget(prompts: Prompts, topology: Topology, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """The longest answer, in tokens, where nothing else is asked for."""
    try:
        long = tokenizer is not None and thinks(own_options(prompts, topology), tokenizer)
    except TEMPLATE_ERRORS:
        # Reported where a prompt is filled in.
        long = False
    return THINKING_BUDGET if long else BUDGET


def _asked(tokenizer: PreTrainedTokenizerBase, options) -> str:
    return render(tokenizer, [{"role": "user", "content": "?"}], options, "2000-01-01")
