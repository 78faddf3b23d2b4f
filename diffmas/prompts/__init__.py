"""Role prompts: data in YAML, filled with an item's fields and wrapped in the model's chat template."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from diffmas.yaml_file import read_yaml

FOLDER = Path(__file__).parent
#: Templates of a role.
KINDS = ("system", "user", "text")


@dataclass(frozen=True)
class Prompts:
    """Prompt templates by role, e.g. `{"planner": {"system": "…", "user": "… {question} …"}}`.

    Templates are `str.format` strings over an item's fields; `system` is optional. The role "default", where
    there is one, serves every role without an entry of its own. Where agents talk in text, what earlier ones wrote is
    put before `user`, under their names; `text`, an optional template with a place `{messages}`, is used instead.
    Errors name the `source`.
    """

    roles: Mapping[str, Mapping[str, str]]
    source: str = "prompts"

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
            if not isinstance(role, dict) or "user" not in role or [key for key in role if key not in KINDS]:
                raise ValueError(f"{source}: role {name} is {role!r}; allowed: user, and optionally system and text")
            for kind, template in role.items():
                if not isinstance(template, str):
                    raise ValueError(f"{source}: {kind} of role {name} is {template!r}; allowed: a text")
                _parse(template, f"{source}: {kind} of role {name}")
        return cls(roles, source)

    def check(self, item: Mapping[str, Any]) -> None:
        """Raise `ValueError` where a prompt cannot be filled with an item like this one."""
        for name in self.roles:
            self.messages(name, item)
            self.messages(name, item, [(name, "text")])

    def fields(self, role: str) -> list[str]:
        """Fields of an item that the prompt of `role` names, in its order.

        Raises:
            ValueError: a role without a prompt.
        """
        template = self._template(role)
        parsed = (_parse(template[kind], f"{kind} of role {role}") for kind in ("system", "user") if kind in template)
        return list(dict.fromkeys(name for names in parsed for name in names))

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
        raise ValueError(f"{self.source}: {kind} of role {role} {wrong}; allowed: {', '.join(item)}")

    def _template(self, role: str) -> Mapping[str, str]:
        template = self.roles.get(role, self.roles.get("default"))
        if template is None:
            raise ValueError(f"{self.source}: role is {role!r}, which has none; allowed: {', '.join(self.roles)}")
        return template

    def encode(
        self,
        role: str,
        items: Sequence[Mapping[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        written: Sequence[Sequence[tuple[str, str]]] | None = None,
    ) -> list[list[int]]:
        """Token ids of every item's prompt, ready for an answer to follow; `written`: per item, as in `messages`."""
        written = [()] * len(items) if written is None else written
        chats = [self.messages(role, item, texts) for item, texts in zip(items, written, strict=True)]
        if tokenizer.chat_template:
            texts = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]
        else:
            texts = ["\n\n".join(m["content"] for m in chat) + "\n" for chat in chats]
        return tokenizer(texts, add_special_tokens=not tokenizer.chat_template)["input_ids"]


def _parse(template: str, what: str) -> list[str]:
    """The fields a template names; ValueError where its braces do not match."""
    try:
        return [name for _, name, _, _ in string.Formatter().parse(template) if name]
    except ValueError as error:
        allowed = "{field} for a field, {{ and }} for braces"
        raise ValueError(f"{what} is {template!r} ({error}); allowed: {allowed}") from None
