"""Folders that are gone when their process is, however it ends."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

#: Waits until nobody holds the other end of its standard input, which a killed process does not either.
_REMOVE = "import shutil, sys; sys.stdin.buffer.read(); shutil.rmtree(sys.argv[1], ignore_errors=True)"


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
