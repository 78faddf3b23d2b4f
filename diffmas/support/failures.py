"""How the programs end when something fails: a line that says what, on standard error, and an exit status."""

from __future__ import annotations

import contextlib
import pickle
import re
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError

from diffmas.sandbox import SandboxError
from diffmas.support.distributed import process
from diffmas.support.not_finite import NotFiniteError

#: What the programs report on a line, without a traceback.
ERRORS = (ValueError, TypeError, OSError, ModuleNotFoundError, NotFiniteError, SandboxError)
#: What reading and writing files raises besides the programs' own errors.
FILE_ERRORS = (SafetensorError, pickle.UnpicklingError, zipfile.BadZipFile, EOFError, zlib.error)
#: What a chat template raises that refuses a conversation, or fails on one.
TEMPLATE_ERRORS = (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError)
#: What torch says in a RuntimeError where there is no memory, and where a file cannot be read or written.
_NO_MEMORY = re.compile(r"can't allocate memory|Cannot allocate memory|out of memory|Storage size calculation overflow")
_NO_FILE = re.compile(r"PytorchStream(Reader|Writer) failed|unexpected pos|failed finding central directory")


def run_program(name: str, work: Callable[[], int], *, lower: str) -> int:
    """`work()`, the program's exit status: 2 after an error that is the user's to mend, 130 after Ctrl-C.

    `lower`: the flags that take less memory where they are smaller.
    """
    try:
        return work()
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if (told := _told(error, lower)) is None:
            raise
        where = f" in process {process()}" if process() else ""
        print(f"{name}: error{where}: {told}", file=sys.stderr)
        return 2


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that there was no memory, on any device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Whatever goes wrong while a library reads `what` is a `ValueError` that names it."""
    try:
        yield
    except ERRORS as error:
        # Those that say what is wrong in a text do not say in which; nor do libraries' own.
        own = type(error).__module__.partition(".")[0] in ("builtins", "diffmas")
        if own and not isinstance(error, UnicodeError):
            raise
        raise ValueError(f"{what} cannot be read: {_line(error)}") from error
    except Exception as error:
        if out_of_memory(error):
            raise
        raise ValueError(f"{what} cannot be read: {_line(error)}") from error


@contextlib.contextmanager
def filling_template(role: str) -> Iterator[None]:
    """A chat template that refuses the prompt of `role`, or fails on it, is a `ValueError` that says so."""
    try:
        yield
    except TemplateError as error:
        raise ValueError(f"the model's chat template refuses the prompt of role {role}: {_line(error)}") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(
            f"the model's chat template fails on the prompt of role {role}: {type(error).__name__}: {_line(error)}"
        ) from error


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """A file that cannot be written is an `OSError` that names `path`, whichever library wrote it."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(f"{path} cannot be written: {_line(error)}") from error
    except (*FILE_ERRORS, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _NO_FILE.search(str(error)):
            raise
        raise OSError(f"{path} cannot be written: {_line(error)}; is there room on the disk?") from error


def _told(error: Exception, lower: str) -> str | None:
    """The line for `error`; None where it is a fault of the program, whose traceback is wanted."""
    if out_of_memory(error):
        return f"out of memory ({_line(error) or type(error).__name__}); what takes less: {lower}"
    if isinstance(error, TemplateError):
        return f"the model's chat template cannot be filled: {_line(error)}"
    if isinstance(error, FILE_ERRORS) or (isinstance(error, RuntimeError) and _NO_FILE.search(str(error))):
        return f"a file cannot be read or written: {_line(error) or type(error).__name__}"
    return str(error) if isinstance(error, ERRORS) else None


def _line(error: BaseException) -> str:
    """Its message without torch's own stack, on one line that can be read at a glance."""
    text = re.split(r"\n(?:Exception raised from|frame #)", str(error))[0]
    line = " ".join(text.split())
    return line if len(line) <= 300 else f"{line[:300]} …"
