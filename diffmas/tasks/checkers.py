"""How the answers of a `.jsonl` task are checked: the kind, asked for or chosen from the right answers.

Every right answer of a file has to pass its own checker, so that a kind that cannot judge it is found when the task is
loaded, not in a table of zeros.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from diffmas.answers import choice, code, exact, mathematics, own, text
from diffmas.sandbox import SandboxError
from diffmas.tasks import options
from diffmas.tasks.base import CHECKERS, Item

_KINDS = {"mathematics": mathematics, "choice": choice, "exact": exact, "text": text, "code": code}
_FORMULA = re.compile(r"\\[a-zA-Z]+|[\^√π∞]|[a-z]\s*[-+*/=]\s*[0-9a-z]|[0-9]\s*[-+*/]?\s*[a-z]\s*[-+=]")
_WORDS = re.compile(r"[^\W\d_]+(?:[ '-][^\W\d_]+)*")


@dataclass(frozen=True)
class Checker:
    """A kind by name, with what a :class:`~diffmas.tasks.base.Task` needs of it."""

    name: str
    check: Callable[[str, Item], bool]
    extract: Callable[[str], str | None]
    ready: Callable[[], None] = lambda: None

    @property
    def prompts(self) -> str:
        """The family of role prompts that asks for such answers."""
        return self.name if self.name in ("choice", "code") else "reasoning"


def load(name: str) -> Checker:
    """The checker `name`; ValueError where there is none."""
    if ":" in name:
        return Checker(name, own.load(name), own.extract)
    if name not in _KINDS:
        raise ValueError(f"checker is {name!r}; allowed: {', '.join(CHECKERS)}, or module:function")
    kind = _KINDS[name]
    return Checker(name, kind.check, kind.extract, code.ready if kind is code else lambda: None)


def chosen(items: Sequence[Item]) -> str:
    """The kind that fits all right answers.

    `code` where every item has tests; `choice` where all are single capital letters; `mathematics` where all are
    numbers, formulas or, among more of these, words; `text` otherwise.
    """
    golds = [str(item["gold"]).strip() for item in items]
    if all(item.get("test") for item in items):
        return "code"
    if all(re.fullmatch(r"\(?[A-Z]\)?", gold) for gold in golds):
        return "choice"
    numbers = sum(text.is_number(gold) for gold in golds)
    formulas = [gold for gold in golds if not text.is_number(gold) and _FORMULA.search(gold)]
    words = sum(bool(_WORDS.fullmatch(gold)) for gold in golds if gold not in set(formulas))
    if numbers + len(formulas) + words == len(golds) and (formulas or not words) and numbers + len(formulas) > words:
        return "mathematics"
    return "text"


def fitted(name: str, item: dict[str, Any], letters: int) -> dict[str, Any]:
    """The item with the fields that the checker `name` needs; it has so many `letters` where it lists no options."""
    return _with_options(item, letters) if name == "choice" else _with_tests(item) if name == "code" else item


def letters(items: Sequence[Item]) -> int:
    """How many options there are at least, by the right answers that are letters; four, where these are fewer."""
    return max(
        [4, *(choice.LETTERS.index(g) + 1 for item in items if len(g := _letter(item)) == 1 and g in choice.LETTERS)]
    )


def verify(checker: Checker, items: Sequence[Item], path: str, first: int = 1, *, run: bool = True) -> None:
    """Raise `ValueError` for the first item whose right answer, bare or as training teaches it, counts as wrong.

    Programs pass where they can be run; without `run`, or on a machine that confines none, they only have to be there.
    """
    verdicts: Iterable[bool]
    if checker.name == "code":
        verdicts = _programs(items, run)
    else:
        verdicts = (checker.check(item["gold"], item) and checker.check(item["answer"], item) for item in items)
    for number, (item, right) in enumerate(zip(items, verdicts, strict=True), first):
        if not right:
            raise ValueError(
                f"{path} item {number}: the right answer {item['gold'][:80]!r} does not pass the checker "
                f"{checker.name!r}; allowed: an answer that does, or another --checker ({', '.join(CHECKERS)}, "
                "module:function)"
            )


def _programs(items: Sequence[Item], run: bool) -> list[bool]:
    found = [code.program(item["answer"], item.get("entry_point")) is not None for item in items]
    if run and all(found):
        try:
            code.ready()
        except SandboxError:
            return found
        with ThreadPoolExecutor() as pool:
            return list(pool.map(lambda item: code.check(item["answer"], item), items))
    return found


def _letter(item: Item) -> str:
    """The right answer, "(b)" as "B"."""
    gold = str(item["gold"]).strip()
    return lone[1].upper() if (lone := re.fullmatch(r"\(?([A-Za-z])\)?", gold)) else gold


def _with_options(item: dict[str, Any], count: int) -> dict[str, Any]:
    listed, gold = item.get("options"), _letter(item)
    if listed is None:
        return {**item, "gold": gold, "letters": ", ".join(choice.LETTERS[:count])}
    if isinstance(listed, Mapping):
        listed = _by_letter(listed)
    if not isinstance(listed, list) or gold not in list(choice.LETTERS[: len(listed)]):
        raise ValueError(f"the right answer is {item['gold']!r}; allowed: the letter of one of its options {listed!r}")
    # "A. Paris" as option A is Paris.
    behind = [re.match(rf"\(?{a}[).:]\s+(?=\S)", str(o)) for a, o in zip(choice.LETTERS, listed, strict=False)]
    if behind and all(behind):
        listed = [match.string[match.end() :] for match in behind]
    question = item["question"]
    made = options.item(item, question, listed, choice.LETTERS.index(gold))
    shown = question if _lists(question, made["options"]) else made["question"]
    return {**made, "question": shown, "answer": item["answer"]}


def _by_letter(listed: Mapping[str, Any]) -> list[Any]:
    """The options in the order of their letters, of `{"A": …, "B": …}` or ARC's `{"text": […], "label": […]}`."""
    labels, texts = list(listed), list(listed.values())
    if set(labels) == {"text", "label"} and all(isinstance(value, list) for value in texts):
        labels, texts = listed["label"], listed["text"]
    found = sorted(zip((str(label).strip().upper() for label in labels), texts, strict=False), key=lambda pair: pair[0])
    if len(labels) != len(texts) or "".join(letter for letter, _ in found) != choice.LETTERS[: len(found)]:
        raise ValueError(f"the letters of its options are {labels!r}; allowed: A, B and so on, one for each option")
    return [option for _, option in found]


def _lists(question: str, texts: Sequence[str]) -> bool:
    """Whether a question lists its options already, each behind its letter: "A) Paris", "(a) Paris", "**A.** Paris"."""
    return all(
        re.search(rf"(?<!\w)(?i:{letter})[*_ ]*[).:\]-][)*_\s]*{re.escape(option)}(?!\w)", question)
        for letter, option in zip(choice.LETTERS, texts, strict=False)
    )


def _with_tests(item: dict[str, Any]) -> dict[str, Any]:
    test, entry_point = item.get("test"), item.get("entry_point")
    test = "\n".join(map(str, test)) if isinstance(test, list) else str(test or "")
    if not test.strip():
        raise ValueError("the tests are missing (field 'test')")
    if entry_point and re.search(r"^def check\(", test, re.M) and not re.search(r"^check\(", test, re.M):
        test = f"{test}\n\ncheck({entry_point})\n"
    return {**item, "test": _called(test)}


def _called(test: str) -> str:
    """Tests that are functions with calls of them.

    Raises:
        ValueError: tests that would pass whatever the program does, since nothing in them is ever run.
    """
    try:
        body: list[Any] = ast.parse(test).body
    except SyntaxError as error:
        raise ValueError(f"the tests are no Python: {error}") from None
    passive = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Pass)
    active = [node for node in body if not isinstance(node, passive) and not _is_literal(node) and not _is_main(node)]
    if any(isinstance(inner, (ast.Call, ast.Assert)) for node in active for inner in ast.walk(node)):
        return test
    functions = [node.name for node in body if isinstance(node, ast.FunctionDef) and node.name.startswith("test")]
    if functions and all(not node.args.args for node in body if getattr(node, "name", None) in functions):
        return "\n".join([test, "", *(f"{name}()" for name in functions), ""])
    raise ValueError(
        "nothing in the tests is ever run; allowed: statements that assert, functions test_… without arguments, or "
        "def check(candidate) beside a field entry_point"
    )


def _is_literal(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_main(node: ast.stmt) -> bool:
    """Whether it is `if __name__ == "__main__":`, which a program's tests are not run as."""
    return isinstance(node, ast.If) and "__name__" in {n.id for n in ast.walk(node.test) if isinstance(n, ast.Name)}
