"""Programs: the code in an answer, and whether it passes an item's tests in the sandbox."""

from __future__ import annotations

import ast
import io
import re
import textwrap
from collections.abc import Mapping
from typing import Any

from diffmas.answers import reasoning
from diffmas.sandbox import Limits, Result, best_mode, run

LIMITS = Limits(seconds=20.0, cpu_seconds=20)

_FENCE = re.compile(reasoning.FENCE)
_PYTHON = re.compile(r"(?:python|py)?[\d.]*|ipython")
_TAGGED = re.compile(r"(?i)<answer>((?:(?!<answer>)[\s\S])*?)</answer>")
# A byte-order mark begins a file, a file's text can begin anywhere in an answer.
_MARK = re.compile(r"^\ufeff", re.M)
# Definitions in a program that does not compile.
_DEFINED = re.compile(r"^(?:async\s+def|def|class)\s+(\w+)|^(\w+)\s*=", re.M)
#: How many fences inside one docstring are taken for examples.
_EXAMPLES = 8


def program(text: str, entry_point: str | None = None) -> str | None:
    """The code of an answer: its last block fenced as Python (or unmarked) that defines `entry_point`, else its last.

    What stands unfenced between `<answer>` tags is a last block, and code that an answer begins with a first one, if
    they compile and define `entry_point`. A text that compiles is code itself. None where there is no code.
    """
    whole = _MARK.sub("", text)
    # A program may well have a tag of reasoning in a string or a comment.
    for text in (whole, reasoning.removed(whole)):
        if _compiles(text):
            return text
    fenced, begun, prose = _fenced(re.sub(r"(?i)(<answer>)[ \t]*(?=```|~~~)", r"\1\n", text))
    blocks = [block for language, block in fenced if _PYTHON.fullmatch(language)]
    tagged = [code for code in _TAGGED.findall(prose)[-1:] if _compiles(code)]
    found = blocks or tagged
    if entry_point is not None:
        name = re.match(r"\w*", entry_point)[0]
        # What an answer begins with can end with a line that introduces the block behind it.
        bare = [code for code in (begun, begun.rstrip().rpartition("\n\n")[0]) if fenced and _compiles(code)]
        for methods in (False, True):
            if defining := [code for code in [*bare, *blocks, *tagged] if name in _defined(code, methods)]:
                found = defining
                break
    return found[-1] if found and found[-1].strip() else None


def _defined(code: str, methods: bool = False) -> set[str]:
    """What a program defines outside functions, under a condition or with `try` too; with `methods`, in classes too."""
    tree = _tree(code)
    if tree is None:
        return {name for pair in _DEFINED.findall(code) for name in pair}
    names: set[str] = set()
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
            if not (methods and isinstance(node, ast.ClassDef)):
                continue
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target] if node.value else []
            stored = (
                n for target in targets for n in ast.walk(target) if isinstance(getattr(n, "ctx", None), ast.Store)
            )
            names |= {n.id for n in stored if isinstance(n, ast.Name)}
        waiting += [n for n in ast.iter_child_nodes(node) if isinstance(n, (ast.stmt, ast.excepthandler))]
    return names


def _fenced(text: str) -> tuple[list[tuple[str, str]], str, str]:
    """Language and content of every fenced block, what stands before the first one, and outside of all of them."""
    lines, blocks, prose, first, at = list(io.StringIO(text, newline="")), [], [], None, 0
    while at < len(lines):
        if opened := _FENCE.match(lines[at]):
            first = "".join(prose) if first is None else first
            block, at = _block(lines, at + 1, opened)
            blocks.append((opened["language"].lower(), block))
        else:
            prose.append(lines[at])
            at += 1
    return blocks, "".join(prose) if first is None else first, "".join(prose)


def _block(lines: list[str], begin: int, opened: re.Match) -> tuple[str, int]:
    """The content of the block that `opened` began, and the line behind it; a last one may lack its closing fence.

    A fence closes it where the code before it compiles, though it stand behind code on the same line, and does not
    where it is an example in a docstring. Blocks that do not compile end with the first line that is a fence.
    """
    mark, python = opened["fence"], _PYTHON.fullmatch(opened["language"].lower())
    slip, ends = None, []
    for at in range(begin, len(lines)):
        fence = _FENCE.match(lines[at])
        if fence and reasoning.closes(fence, opened):
            ends.append((at, at + 1))
            if not python or len(ends) > _EXAMPLES or not _in_docstring(_dedented("".join(lines[begin:at]))):
                break
        elif fence and slip is not None:
            ends.append((at, at))  # The next block begins here.
            break
        elif slip is None and not ends and mark in lines[at]:
            slip = at
    else:
        ends.append((len(lines), len(lines)))
    code, behind = _dedented("".join(lines[begin : ends[-1][0]])), ends[-1][1]
    if not python or _compiles(code):
        return code, behind
    if slip is not None:
        code = _dedented("".join([*lines[begin:slip], lines[slip].partition(mark)[0].rstrip(), "\n"]))
        if _compiles(code):
            return code, slip + 1
    return _dedented("".join(lines[begin : ends[0][0]])), ends[0][1]


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


def _compiles(code: str) -> bool:
    return bool(code.strip()) and _tree(code) is not None


def _in_docstring(code: str) -> bool:
    """Whether `code` breaks off in a string of many lines."""
    try:
        ast.parse(code)
    except SyntaxError as error:
        return "triple-quoted" in (error.msg or "")
    except (ValueError, RecursionError, MemoryError):
        pass
    return False
