"""Role prompts: data in YAML, filled with an item's fields and wrapped in the model's chat template."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedTokenizerBase

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Prompts:
    """Prompt templates by role, e.g. `{"planner": {"system": "…", "user": "… {question} …"}}`.

    Templates are `str.format` strings over an item's fields; `system` is optional. The role "default", where
    there is one, serves every role without an entry of its own. Where agents talk in text, what earlier ones wrote is
    put before `user`, under their names; `text`, an optional template with a place `{messages}`, is used instead.
    """

    roles: Mapping[str, Mapping[str, str]]

    @classmethod
    def load(cls, path: str | Path) -> Prompts:
        """From a YAML file `{roles: {name: {system, user}}}`, or one of the built-in families by name."""
        path = FOLDER / f"{path}.yaml" if (FOLDER / f"{path}.yaml").is_file() else Path(path)
        if not path.is_file():
            families = ", ".join(sorted(p.stem for p in FOLDER.glob("*.yaml")))
            raise FileNotFoundError(f"prompts is {str(path)!r}: no such file; allowed: a .yaml file, or {families}")
        data = yaml.safe_load(path.read_text())
        roles = data.get("roles") if isinstance(data, dict) else None
        if not isinstance(roles, dict) or not roles:
            raise ValueError(f"prompts {path} has no roles; allowed: {{roles: {{name: {{system, user}}}}}}")
        for name, role in roles.items():
            if not isinstance(role, dict) or "user" not in role or set(role) - {"system", "user", "text"}:
                raise ValueError(f"role {name} in {path} is {role!r}; allowed: user, and optionally system and text")
        return cls(roles)

    def fields(self, role: str) -> list[str]:
        """Fields of an item that the prompt of `role` names, in its order.

        Raises:
            ValueError: a role without a prompt.
        """
        template = self._template(role)
        parsed = (string.Formatter().parse(template[kind]) for kind in ("system", "user") if kind in template)
        return list(dict.fromkeys(name for text in parsed for _, name, _, _ in text if name))

    def messages(
        self, role: str, item: Mapping[str, Any], written: Sequence[tuple[str, str]] = ()
    ) -> list[dict[str, str]]:
        """Chat messages of `role` for an item; `written`: (name, text) of the agents whose texts it reads.

        Raises:
            ValueError: a role without a prompt, or a prompt that names a field the item lacks.
        """
        template = self._template(role)
        user, before = template["user"], ""
        if written and "text" in template:
            user, item = template["text"], {**item, "messages": "\n".join(text.strip() for _, text in written)}
        elif written:
            before = "".join(f"[{name}]\n{text.strip()}\n\n" for name, text in written)
        try:
            chat = [{"role": "system", "content": template["system"].format_map(item)}] if "system" in template else []
            return [*chat, {"role": "user", "content": before + user.format_map(item)}]
        except KeyError as error:
            fields = ", ".join(k for k in item)
            raise ValueError(f"the prompt of role {role} names the field {error}; the item has {fields}") from None

    def _template(self, role: str) -> Mapping[str, str]:
        template = self.roles.get(role, self.roles.get("default"))
        if template is None:
            raise ValueError(f"role is {role!r}: it has no prompt; allowed: {', '.join(self.roles)}")
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
