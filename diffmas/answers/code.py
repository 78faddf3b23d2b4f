"""Programs: the code in an answer, and whether it passes an item's tests in the sandbox."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Mapping
from typing import Any

from diffmas.answers import reasoning
from diffmas.sandbox import Limits, Result, best_mode, run

LIMITS = Limits(seconds=20.0, cpu_seconds=20)

_FENCE = re.compile(
    r"[ \t]*(?P<marker>(?:[-*+]|[0-9]{1,3}[.)])[ \t]+)?"
    r"(?P<fence>`{3,}|~{3,})[ \t]*(?:\{[ \t]*\.?)?(?P<language>[\w+.-]*)"
)
_PYTHON = re.compile(r"(?:python|py)?[\d.]*|ipython")


def program(text: str, entry_point: str | None = None) -> str | None:
    """The code of an answer: its last block fenced as Python (or unmarked) that defines `entry_point`, else its last.

    A text without a fence is code itself, if it compiles. None where there is no code.
    """
    text = reasoning.removed(text)
    blocks = [_dedented(block) for language, block in _fenced(text) if _PYTHON.fullmatch(language)]
    if not blocks:
        return text if "```" not in text and text.strip() and _tree(text) is not None else None
    if entry_point is not None:
        defines = re.compile(
            rf"^(?:async\s+def|def|class)\s+{re.escape(entry_point)}\b|^{re.escape(entry_point)}\s*=", re.M
        )
        blocks = [b for b in blocks if defines.search(b)] or blocks
    return blocks[-1] if blocks[-1].strip() else None


def _fenced(text: str) -> list[tuple[str, str]]:
    """Language and content of every fenced block; the last one may lack its closing fence."""
    blocks, lines, opened = [], [], None
    for line in text.splitlines(keepends=True):
        fence = _FENCE.match(line)
        if opened is None:
            if fence:
                opened, lines = fence, []
        elif fence and fence["fence"].startswith(opened["fence"]) and not (fence["language"] or fence["marker"]):
            blocks.append((opened["language"].lower(), "".join(lines)))
            opened = None
        else:
            lines.append(line)
    return blocks if opened is None else [*blocks, (opened["language"].lower(), "".join(lines))]


def _dedented(block: str) -> str:
    """Without the indentation that all lines share, as in a list item; a blank line has none."""
    return textwrap.dedent(block) if block[:1].isspace() and block.strip() else block


def extract(text: str) -> str | None:
    """The program without comments, docstrings and layout, so that equal programs are equal strings."""
    code = program(text)
    if code is None:
        return None
    plain = "\n".join(line.rstrip() for line in code.strip().splitlines())
    tree = _tree(code)
    if tree is None:
        return plain
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            body = [n for n in node.body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
            node.body = body or ([] if isinstance(node, ast.Module) else [ast.Pass()])
    try:
        return ast.unparse(tree) or None
    except (RecursionError, MemoryError):
        return plain


def check(text: str, item: Mapping[str, Any]) -> bool:
    """Whether the program in `text` passes the item's tests (see :func:`execute`)."""
    result = execute(text, item)
    return result is not None and result.passed


def ready() -> None:
    """Raise `SandboxError` where programs cannot be confined on this machine."""
    best_mode()


def execute(text: str, item: Mapping[str, Any], limits: Limits = LIMITS) -> Result | None:
    """Run the program in `text` in the sandbox and judge it by `item["test"]`; None where there is no program.

    Where the item has a `context` (the imports and helpers a completion starts from), it goes before both, and tests
    use its helpers, whatever the program makes of them. Both may import numpy.

    Raises:
        SandboxError: programs cannot be confined on this machine.
    """
    code = program(text, item.get("entry_point"))
    if code is None:
        return None
    return run(
        code, limits, tests=item["test"], context=item.get("context", ""), entry_point=item.get("entry_point"),
        packages=["numpy"],
    )  # fmt: skip


def _tree(code: str) -> ast.Module | None:
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
