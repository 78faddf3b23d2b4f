"""What a run will need of its prompts, agents and items: asked before anything is trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from diffmas.agents.thinking import own_options, switch, thinks
from diffmas.agents.topology import Topology, alone
from diffmas.evaluation.evaluator import LABELS, TEXT
from diffmas.evaluation.methods.base import Method
from diffmas.evaluation.methods.stitch import STITCH, STITCH_TRAINED
from diffmas.evaluation.methods.text import TextChannel
from diffmas.prompts import Prompts
from diffmas.tasks import Item, Task

#: Why another row's trace cannot be given to the only item there is.
ONE_ITEM = "there is one item to evaluate on, and no other whose trace it could get"


def check_prompts(task: Task, roles: Iterable[str], *, training: bool) -> None:
    """Raise `ValueError` where a role has no prompt, or one that an item cannot fill.

    Looks at every item to evaluate on and, with `training`, to train on.
    """
    roles = list(dict.fromkeys(roles))
    needed = {role: task.prompts.fields(role) for role in roles}
    for kind, items in (("evaluation", task.eval), *([("training", task.train)] if training else [])):
        for number, item in enumerate(_different(items), 1):
            try:
                for role in roles:
                    task.prompts.check(role, item)
                    if empty := [name for name in needed[role] if item.get(name) is None]:
                        raise ValueError(
                            f"{task.prompts.source}: role {role} names the field {empty[0]!r}, which is null"
                        )
            except ValueError as error:
                raise ValueError(f"{task.name}, {kind} item {number}: {error}") from None


def roles_of(topology: Topology) -> list[str]:
    return [agent.role for agent in topology.agents]


def variants_left_out(task: Task, topology: Topology) -> dict[str, str]:
    """Variants of an evaluation (:data:`~diffmas.evaluation.evaluator.LABELS`) that would say nothing, and why.

    Raises:
        ValueError: an item that the prompt of the one agent it is compared with cannot take.
    """
    reasons = {}
    if len(topology.agents) == 1:
        reasons = dict.fromkeys(("mismatched", "zero", "noise", "training_free"), "an agent alone receives no trace")
        reasons |= dict.fromkeys(TEXT, "an agent alone receives no text")
    elif not several(task.eval):
        reasons["mismatched"] = ONE_ITEM
    if len(topology.model_names) > 1:
        reasons |= dict.fromkeys(TEXT, f"agents run on several models, {', '.join(topology.model_names)}")
    roles = roles_of(alone(topology))
    if (reason := _no_prompt(task.prompts, roles)) is not None:
        return reasons | {"single": reason}
    check_prompts(task, roles, training=False)
    return reasons


def other_modes(task: Task, topology: Topology, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Of :data:`~diffmas.evaluation.evaluator.MODES`, that which the one agent is not in by itself.

    None where the chat template has no switch for thinking, or that agent no prompt.
    """
    one = alone(topology)
    if switch(tokenizer) is None or not task.prompts.has(one.last.role):
        return []
    thinking = thinks(own_options(task.prompts, one), tokenizer)
    return ["single_no_thinking" if thinking else "single_thinking"]


def several(items: Sequence[Item]) -> bool:
    """Whether an item has another one that is not the same."""
    return len(items) > 1 and any(dict(items[i]) != dict(items[0]) for i in range(1, len(items)))


def print_left_out(left_out: Mapping[str, str]) -> None:
    """What an evaluation will leave out, a line each."""
    for variant, reason in left_out.items():
        print(f"not evaluated: {LABELS[variant]} ({reason})", flush=True)


def method_left_out(method: Method, task: Task, topology: Topology) -> str | None:
    """Why a method does not apply to a task and the topology of its settings; None where it does."""
    talks = method.channel is TextChannel
    if len(topology.agents) == 1 and (talks or len(method.controls) > 1):
        return f"topology {topology.name} has one agent, whom nobody hands anything"
    if len(topology.model_names) > 1 and (talks or method in (STITCH, STITCH_TRAINED)):
        return f"agents run on several models, {', '.join(topology.model_names)}"
    return _no_prompt(task.prompts, method_roles(method, topology))


def method_roles(method: Method, topology: Topology) -> list[str]:
    """Roles whose prompts a method reads."""
    talks = method.channel is TextChannel
    return [*roles_of(method.topology(topology)), *(roles_of(topology) if talks else [])]


def _no_prompt(prompts: Prompts, roles: Sequence[str]) -> str | None:
    missing = next((role for role in roles if not prompts.has(role)), None)
    return None if missing is None else f"{prompts.source} has no prompt for the role {missing!r}"


def _different(items: Sequence[Item]) -> Iterator[Item]:
    """All items; one of those that are drawn, which have the same fields."""
    if getattr(items, "drawn", False):
        return iter([items[0]] if len(items) else [])
    return iter(items[i] for i in range(len(items)))
