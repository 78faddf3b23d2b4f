"""Runs the tests of a program that runs elsewhere. No line of the program is executed here.

Tests call the program through :mod:`wire`: arguments and results travel by value and are built anew as plain types, so
that an object cannot lie about itself, and only this process holds the descriptor of the verdict.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import io
import json
import os
import random
import re
import sys
import traceback
import types
from contextlib import suppress
from typing import Any

import wire

#: Objects of the library whose public attributes reach nothing but themselves.
_READABLE = (io.StringIO, io.BytesIO, random.Random, re.Pattern, re.Match)
#: What a program may do with a test's object besides using its attributes.
_ALLOWED = ("call", "next", "iter", "len", "bool", "item", "contains", "hash", "eq", "lt", "le", "gt", "ge")
#: What a decorator copies.
_NAMES = ("__name__", "__qualname__", "__doc__", "__module__")
#: Functions that reach everything, where a test hands them over.
_CLOSED = (
    exec, eval, compile, open, __import__, getattr, setattr, delattr, vars, globals, locals, breakpoint, input,
)  # fmt: skip


def main(request: dict, read: int, write: int, verdict: int) -> None:
    """Judge and leave. `request` has "context", "tests" and "entry_point"."""
    judge = _Judge(read, write, verdict)
    try:
        judge.peer.start()
        judge.run(request["context"], request["tests"], request["entry_point"])
    except BaseException as error:
        with suppress(BaseException):
            sys.stdout.flush()
        with suppress(BaseException):
            traceback.print_exc(limit=-8)
            sys.stderr.flush()
        judge.leave("exception", type(error).__name__[:64])
    judge.leave("passed")


class _Judge:
    def __init__(self, read: int, write: int, verdict: int):
        self.verdict, self.peer = verdict, _Connection(read, write, self)

    def leave(self, reason: str, detail: str = "") -> None:
        """Say how it ended and end; tests cannot catch that."""
        with suppress(BaseException):
            sys.stdout.flush()
        os.write(self.verdict, json.dumps([reason, detail]).encode())
        os._exit(0)

    def run(self, context: str, tests: str, entry_point: str | None) -> None:
        tree = ast.parse(tests, "tests.py")
        module = types.ModuleType("tests")
        sys.modules["tests"] = module
        scope = module.__dict__
        exec(compile(context, "context.py", "exec"), scope)
        loaded = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        given = {*scope, *vars(builtins)} - {entry_point}
        for name, (how, value) in self.peer.request("names", 0, (sorted(loaded - given),)).items():
            if how in ("module", "from"):
                if value.partition(".")[0] not in {*sys.stdlib_module_names, "numpy"}:
                    continue
                # From the library itself; the program says only what it has imported.
                value = importlib.import_module(value)
                value = getattr(value, name) if how == "from" else value
            elif name != entry_point and (name in sys.stdlib_module_names or name in ("np", "numpy")):
                continue
            if name in loaded - given:
                scope[name] = value
        exec(compile(tree, "tests.py", "exec"), scope)


class _Connection(wire.Peer):
    """The judge's end: what breaks the protocol ends the judgement, whatever the tests catch."""

    compares = False

    def __init__(self, read: int, write: int, judge: _Judge):
        super().__init__(read, write, self._serve)
        self.judge = judge

    def start(self) -> None:
        """Wait until the program has been run to its last line."""
        frame = self.receive()
        if "error" in frame:
            raise self._exception(frame["error"])

    def receive(self) -> dict:
        frame = self._safely(super().receive)
        if frame is None:
            self.judge.leave("gone")
        return frame

    def send(self, frame: dict) -> None:
        try:
            super().send(frame)
        except BrokenPipeError:
            self.judge.leave("gone")

    def decode(self, data: Any, objects: list | None = None) -> Any:
        return self._safely(super().decode, data, objects)

    def refill(self, changed: Any, objects: list) -> None:
        self._safely(super().refill, changed, objects)

    def _exception(self, content: Any) -> BaseException:
        return self._safely(super()._exception, content)

    def _safely(self, function, *args):
        try:
            return function(*args)
        except MemoryError:
            self.judge.leave("exception", "MemoryError")
        except Exception as error:
            print(f"the program's answer is not understood: {type(error).__name__}: {error}"[:500], file=sys.stderr)
            self.judge.leave("exception", "Broken")

    def _serve(self, operation: str, number: int, args: list, kwargs: dict) -> Any:
        """A test's functions can be called, its iterators advanced, and its objects' public attributes used.

        All else leads into this process: the frame of a generator, the globals of a function, the files of a path.
        """
        value = self.held[number]
        if operation in ("get", "set"):
            name, own = str(args[0]), type(value).__module__ == "tests"
            # A test's own methods stay what they are.
            settable = own and not callable(getattr(type(value), name, None))
            if operation == "get" and name in _NAMES and isinstance(found := getattr(value, name, None), str):
                return found
            if name.startswith("_") or not (settable if operation == "set" else own or isinstance(value, _READABLE)):
                raise AttributeError(name)
        elif operation == "call" and any(value is closed for closed in _CLOSED):
            raise TypeError(f"{value.__name__} is not available to programs")
        elif operation not in _ALLOWED:
            raise TypeError(f"{operation} of a test's object is not available to programs")
        return wire.OPERATIONS[operation](value, *args, **kwargs)
