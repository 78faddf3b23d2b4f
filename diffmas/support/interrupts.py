"""Ctrl-C while a program is still importing what it needs: nothing has been begun, so it just leaves."""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn

PROGRAMS = ("train", "eval", "ablate", "chat", "serve")


def leave_on_interrupt() -> None:
    """Where a program of this package is starting, Ctrl-C ends it with a line, until :func:`raise_on_interrupt`.

    An exception would not do: it gets lost in an import that catches all, or in a library's callback.
    """
    # While `python -m` looks for a module, here by importing its package, this is all there is in the place of a path.
    if sys.argv[:1] == ["-m"] and _module() in [f"diffmas.{program}" for program in PROGRAMS]:
        signal.signal(signal.SIGINT, _leave)


def raise_on_interrupt() -> None:
    """From here on Ctrl-C is a KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(number, frame) -> NoReturn:
    os.write(2, f"\npython -m {_module()}: interrupted\n".encode())
    os._exit(130)


def _module() -> str:
    words = sys.orig_argv
    return words[words.index("-m") + 1] if "-m" in words[:-1] else ""
