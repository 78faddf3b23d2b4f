"""math-verify in a process of its own.

Its own timeouts need the main thread, and a prediction such as `9^{9^{9^9}}` can keep sympy busy, or take all memory,
for ever. So comparisons run one after another in a child that has little memory and is ended when it takes too long.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import select
import subprocess
import sys
import threading
from pathlib import Path

_CHILD = Path(__file__).with_name("verify_child.py")


class Verifier:
    """`verifier(gold, found)`: whether two answers in LaTeX or plain text are equal. May be called from threads.

    Args:
        seconds: per comparison; one that takes longer, or ends the child, counts as unequal.
        start_seconds: for the child to load.
    """

    def __init__(self, seconds: float = 10.0, start_seconds: float = 120.0):
        self.seconds, self.start_seconds = seconds, start_seconds
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        atexit.register(self.close)

    def __call__(self, gold: str, found: str) -> bool:
        with self._lock:
            if self._child is None or self._child.poll() is not None:
                self._start()
            try:
                self._child.stdin.write(json.dumps([gold, found]).encode() + b"\n")
                self._child.stdin.flush()
                answer = self._line(self.seconds)
            except OSError:
                answer = None
            if answer is None:
                self.close()
            return answer == b"true"

    def close(self) -> None:
        """End the child; the next comparison starts another one."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            for pipe in (self._child.stdin, self._child.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()
            self._child = None

    def _start(self) -> None:
        self._child = subprocess.Popen([sys.executable, str(_CHILD)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        if self._line(self.start_seconds) != b"ready":
            self.close()
            raise ModuleNotFoundError("the package math-verify cannot be loaded; install diffmas[data]")

    def _line(self, seconds: float) -> bytes | None:
        ready, _, _ = select.select([self._child.stdout], [], [], seconds)
        return self._child.stdout.readline().strip() or None if ready else None
