"""Role prompts: data in YAML, filled with an item's fields and wrapped in the model's chat template."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from diffmas.prompts.chat_template import answer_start, render
from diffmas.prompts.control_tokens import ControlTokens, unused_mark
from diffmas.support.yaml_file import read_yaml

FOLDER = Path(__file__).parent
#: Templates of a role.
KINDS = ("system", "user", "text")


@dataclass(frozen=True)
class Prompts:
    """Prompt templates by role, e.g. `{"planner": {"system": "…", "user": "… {question} …"}}`.

    Templates are `str.format` strings over an item's fields; `system` is optional. The role "default", where
    there is one, serves every role without an entry of its own. Where agents talk in text, what earlier ones wrote is
    put before `user`, under their names; `text`, an optional template with a place `{messages}`, is used instead.
    Errors name the `source`. `date` (2026-01-31) is what a chat template takes for today; None: the day it is.
    `system` is the template of every role that has none of its own; an empty one keeps a chat template from writing
    its own. `chat_template_kwargs` are further options of the chat template.
    """

    roles: Mapping[str, Mapping[str, str]]
    source: str = "prompts"
    date: str | None = None
    system: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str | Path) -> Prompts:
        """From a YAML file `{roles: {name: {system, user}}}`, or one of the built-in families by name."""
        path = FOLDER / f"{path}.yaml" if (FOLDER / f"{path}.yaml").is_file() else Path(path)
        if not path.is_file():
            families = ", ".join(sorted(p.stem for p in FOLDER.glob("*.yaml")))
            raise FileNotFoundError(f"prompts is {str(path)!r}: no such file; allowed: a .yaml file, or {families}")
        data, source = read_yaml(path, "prompts"), f"prompts {path}"
        roles = data.get("roles") if isinstance(data, dict) else None
        if not isinstance(roles, dict) or not roles or set(data) != {"roles"}:
            found = [*data] if isinstance(data, dict) else data
            raise ValueError(f"{source} holds {found!r}; allowed: {{roles: {{name: {{system, user, text}}}}}}")
        for name, role in roles.items():
            template_fields(role, f"role {name}", f"{source}: ")
        return cls(roles, source)

    def with_roles(self, roles: Mapping[str, Mapping[str, str]]) -> Prompts:
        """The same with other prompts for `roles`."""
        return replace(self, roles={**self.roles, **roles}) if roles else self

    def with_options(self, options: Mapping[str, Any]) -> Prompts:
        """The same with more options for the chat template; those given here win."""
        kwargs = {**self.chat_template_kwargs, **options}
        return replace(self, chat_template_kwargs=kwargs) if options else self

    def has(self, role: str) -> bool:
        """Whether there is a prompt for `role`."""
        return role in self.roles or "default" in self.roles

    def check(self, role: str, item: Mapping[str, Any]) -> None:
        """Raise `ValueError` where a prompt of `role` cannot be filled with `item`."""
        self.messages(role, item)
        if "text" in self._template(role):
            self.messages(role, item, [(role, "text")])

    def fields(self, role: str) -> list[str]:
        """Fields of an item that the prompt of `role` names, in its order.

        Raises:
            ValueError: a role without a prompt.
        """
        return template_fields(self._template(role), f"role {role}")

    def messages(
        self, role: str, item: Mapping[str, Any], written: Sequence[tuple[str, str]] = ()
    ) -> list[dict[str, str]]:
        """Chat messages of `role` for an item; `written`: (name, text) of the agents whose texts it reads.

        Raises:
            ValueError: a role without a prompt, or a prompt that names a field the item lacks.
        """
        template = self._template(role)
        kind, before = "user", ""
        if written and "text" in template:
            kind, item = "text", {**item, "messages": "\n".join(text.strip() for _, text in written)}
        elif written:
            before = "".join(f"[{name}]\n{text.strip()}\n\n" for name, text in written)
        chat = [{"role": "system", "content": self._filled(role, "system", item)}] if "system" in template else []
        return [*chat, {"role": "user", "content": before + self._filled(role, kind, item)}]

    def _filled(self, role: str, kind: str, item: Mapping[str, Any]) -> str:
        try:
            return self._template(role)[kind].format_map(item)
        except KeyError as error:
            wrong = f"names the field {error}"
        except (ValueError, AttributeError, LookupError, TypeError) as error:
            wrong = f"cannot be filled ({error})"
        role = role if role in self.roles else "default"
        raise ValueError(f"{self.source}: {kind} of role {role} {wrong}; allowed: {', '.join(item)}")

    def _template(self, role: str) -> Mapping[str, str]:
        template = self.roles.get(role, self.roles.get("default"))
        if template is None:
            allowed = ", ".join(self.roles) or "none, no prompts are given"
            raise ValueError(f"{self.source}: role is {role!r}, which has none; allowed: {allowed}")
        return template if self.system is None else {"system": self.system, **template}

    def encode(
        self,
        role: str,
        items: Sequence[Mapping[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        written: Sequence[Sequence[tuple[str, str]]] | None = None,
    ) -> list[list[int]]:
        """Token ids of every item's prompt, ready for an answer to follow; `written`: per item, as in `messages`.

        Control tokens that an item or a `written` text spells are text; those in the role prompt are control tokens.
        """
        written = [()] * len(items) if written is None else written
        control, add = ControlTokens.of(tokenizer), not tokenizer.chat_template
        rows: list[list[int]] = [[]] * len(items)
        plain: dict[int, str] = {}
        for i, (item, texts) in enumerate(zip(items, written, strict=True)):
            fillings = [item, [list(text) for text in texts]]
            if not control.spelled_in(fillings):
                plain[i] = self._render(self.messages(role, item, texts), tokenizer)
                continue
            mark = unused_mark([*fillings, tokenizer.chat_template, self._template(role)])
            marked = [(name, control.marked(text, mark)) for name, text in texts]
            text = self._render(self.messages(role, control.marked(item, mark), marked), tokenizer)
            rows[i] = control.encode(text, mark, add_special_tokens=add)
        if plain:
            encoded = tokenizer([*plain.values()], add_special_tokens=add)["input_ids"]
            for i, ids in zip(plain, encoded, strict=True):
                rows[i] = ids
        twice = [tokenizer.bos_token_id] * 2
        return [ids[1:] if ids[:2] == twice else ids for ids in rows]

    def answer_start(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """What the chat template writes between a question and its answer; nothing where there is no template."""
        return answer_start(tokenizer, self.chat_template_kwargs, self.date)

    def _render(self, chat: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> str:
        """The chat as the tokenizer's template writes it, or its contents alone where there is no template."""
        if not tokenizer.chat_template and not self.chat_template_kwargs:
            return "\n\n".join(message["content"] for message in chat if _says(message)) + "\n"
        return render(tokenizer, chat, self.chat_template_kwargs, self.date)


def _says(message: Mapping[str, str]) -> bool:
    """Whether it is there without a chat template: an empty system prompt is not."""
    return message["role"] != "system" or message["content"] != ""


def template_fields(template: Any, what: str, where: str = "") -> list[str]:
    """Fields of an item that a role's `system` and `user` name, in this order; errors say `what` and `where`.

    Raises:
        ValueError: no mapping of the kinds to texts, or a text whose braces do not match.
    """
    if not isinstance(template, Mapping) or "user" not in template or [key for key in template if key not in KINDS]:
        raise ValueError(f"{where}{what} is {template!r}; allowed: user, and optionally system and text")
    named = {}
    for kind, text in template.items():
        if not isinstance(text, str):
            raise ValueError(f"{where}{kind} of {what} is {text!r}; allowed: a text")
        named[kind] = _parse(text, f"{where}{kind} of {what}")
    return list(dict.fromkeys(name for kind in ("system", "user") for name in named.get(kind, ())))


def _parse(template: str, what: str) -> list[str]:
    """The fields a template names; ValueError where its braces do not match."""
    try:
        named = [name for _, name, _, _ in string.Formatter().parse(template) if name]
    except ValueError as error:
        allowed = "{field} for a field, {{ and }} for braces"
        raise ValueError(f"{what} is {template!r} ({error}); allowed: {allowed}") from None
    # Of `{steps[0]}` and `{author.name}`, what an item has to hold.
    return [re.split(r"[.\[]", name)[0] for name in named]
