"""Folders and programs that are gone when their process is, however it ends."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

#: Both wait until nobody holds the other end of their standard input, which a killed process does not either.
_REMOVE = "import shutil, sys; sys.stdin.buffer.read(); shutil.rmtree(sys.argv[1], ignore_errors=True)"
_END = """
import os, signal, subprocess, sys, threading
# Not through a buffer: a thread that is reading one when the interpreter ends aborts it.
program = subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL, start_new_session=True)
def end():
    while os.read(0, 1):
        pass
    program.terminate()
    try:
        program.wait(float(sys.argv[1]))
    except subprocess.TimeoutExpired:
        pass
    # What it has started itself, too.
    try:
        os.killpg(program.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
threading.Thread(target=end, daemon=True).start()
status = program.wait()
sys.exit(status if status >= 0 else 128 - status)
"""


@contextlib.contextmanager
def vanishing_folder(beside: str | Path | None = None) -> Iterator[Path]:
    """A new folder inside `beside` (default: where temporary ones are); a kill of this process removes it too."""
    if beside is not None:
        Path(beside).mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="diffmas-", dir=beside)).absolute()
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _REMOVE, str(folder)],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    ):  # fmt: skip
        try:
            yield folder
        finally:
            # Here, so that it is gone when this returns; the other process is told when its input is closed.
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def companion(
    command: Sequence[str], environment: Mapping[str, str], *, grace: float = 10
) -> Iterator[subprocess.Popen[bytes]]:
    """A program that runs for as long as this lasts; a kill of this process ends it too.

    Args:
        grace: seconds between being asked to end and being killed, with whatever it has started.
    """
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _END, str(grace), *command],
        stdin=subprocess.PIPE, env=dict(environment), start_new_session=True,
    ) as process:  # fmt: skip
        yield process
