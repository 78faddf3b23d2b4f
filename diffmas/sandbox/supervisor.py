"""Starts one program in a sandbox, watches it and ends all it leaves behind: a script that `diffmas.sandbox` runs.

A request (JSON) comes in on standard input, the outcome (JSON) goes out on standard output. It runs in a process of
its own because namespaces, limits and identities belong to a process. Standard library alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import isolation

RUNNER = Path(__file__).with_name("runner.py").read_text()
SETUP_FAILED = b"setup: "


class Interrupted(Exception):
    pass


def main() -> None:
    request = json.load(sys.stdin)
    signal.signal(signal.SIGTERM, _interrupt)
    isolation.die_with_parent(signal.SIGTERM)
    try:
        outcome = Supervisor(request).run()
    except OSError as error:
        outcome = {"error": str(error)}
    json.dump(outcome, sys.stdout)


def _interrupt(number, frame):
    raise Interrupted


class Supervisor:
    def __init__(self, request: dict):
        self.request, self.limits = request, request["limits"]
        self.namespaces = request["mode"] in ("root", "user")
        # Unprivileged and, as no two processes share an id, nobody else's: signals and limits stay within it.
        self.uid = 50_000 + os.getpid() % 15_000 if os.geteuid() == 0 and request["mode"] != "none" else None
        self.token = secrets.token_hex(16).encode()
        self.output, self.report = b"", b""

    def run(self) -> dict:
        with tempfile.TemporaryFile() as source:
            parts = [part.encode(errors="surrogatepass") for part in self.request["parts"]]
            source.write(" ".join(str(len(part)) for part in parts).encode() + b"\n" + b"".join(parts))
            source.seek(0)
            return self._run(source.fileno())

    def _run(self, source: int) -> dict:
        self.source = source
        self.token_pipe, self.report_pipe, self.output_pipe, self.status_pipe, self.alive = (os.pipe() for _ in "12345")
        self.report_fd = self.report_pipe[1]
        os.write(self.token_pipe[1], self.token)
        wake = os.pipe()
        for fd in (*wake, self.output_pipe[0], self.report_pipe[0], self.status_pipe[0]):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(wake[1])
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        if self.namespaces:
            isolation.enter_namespaces(self.uid, user=self.request["mode"] == "user")
            isolation.die_with_parent(signal.SIGTERM)
        else:
            isolation.adopt_orphans()
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            self._child()
        for pipe in (self.output_pipe, self.report_pipe, self.status_pipe):
            os.close(pipe[1])
        try:
            ended, status = self._watch(child, wake[0], started + self.limits["seconds"])
        finally:
            self._end(child)
        self._read()
        if self.report.startswith(SETUP_FAILED):
            raise OSError(self.report[len(SETUP_FAILED) :].decode(errors="replace"))
        return {
            "passed": self.token in self.report and status == 0 and ended == "exit",
            "ended": ended,
            "status": status,
            "report": self.report.replace(self.token, b"").decode(errors="replace"),
            "output": self.output[: self.limits["output_bytes"]].decode(errors="replace"),
            "seconds": time.monotonic() - started,
        }

    def _watch(self, child: int, wake: int, deadline: float) -> tuple[str, int | None]:
        """Why the program ended ("exit", "timeout", "output") and its exit code, negative for a signal."""
        fds = {self.output_pipe[0], self.report_pipe[0], wake}
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                return "timeout", None
            ready, _, _ = select.select(list(fds), [], [], left)
            fds -= {fd for fd in ready if fd != wake and not self._read_one(fd)}
            if len(self.output) > self.limits["output_bytes"]:
                return "output", None
            with contextlib.suppress(BlockingIOError):
                os.read(wake, 512)
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                if self.namespaces:
                    with contextlib.suppress(BlockingIOError):
                        return "exit", int(os.read(self.status_pipe[0], 16) or b"-9")
                return "exit", os.waitstatus_to_exitcode(status)

    def _read_one(self, fd: int) -> bool:
        """Take what `fd` holds; False at its end."""
        try:
            data = os.read(fd, 1 << 16)
        except BlockingIOError:
            return True
        if fd == self.output_pipe[0]:
            self.output += data
        elif len(self.report) < 4096:
            self.report += data
        return bool(data)

    def _read(self) -> None:
        for fd in (self.output_pipe[0], self.report_pipe[0]):
            for _ in range(4):
                self._read_one(fd)

    def _end(self, child: int) -> None:
        """End every process the program has started. The first of a process-id namespace takes all others along."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child, signal.SIGKILL)
        if self.namespaces:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(child, 0)
            return
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            if self.uid is not None:
                isolation.kill_all_of(self.uid)
            for pid in isolation.children():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:
                return
            time.sleep(0.002)

    def _child(self) -> None:
        """The first process of the namespace, which waits for the program; without namespaces, the program."""
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.setsid()
            isolation.die_with_parent(signal.SIGKILL)
            os.close(self.alive[1])
            os.set_blocking(self.alive[0], False)
            with contextlib.suppress(BlockingIOError):
                if os.read(self.alive[0], 1) == b"":
                    os._exit(1)  # the supervisor went before its death could be heard of
            isolation.first_to_go()
            if not self.namespaces:
                self._become_program()
            isolation.enter_root(self.request["folder"], self.request["visible"], self.limits["disk_bytes"])
            program = os.fork()
            if program == 0:
                os.setsid()
                self._become_program()
            while True:
                pid, status = os.wait()
                if pid == program:
                    os.write(self.status_pipe[1], b"%d" % os.waitstatus_to_exitcode(status))
                    os._exit(0)
        except BaseException as error:
            os.write(self.report_fd, SETUP_FAILED + str(error).encode()[:1024])
        finally:
            os._exit(1)

    def _become_program(self) -> None:
        limits, box = self.limits, "/box" if self.namespaces else self.request["folder"]
        if not self.namespaces:
            os.chdir(box)
        isolation.limit(
            cpu_seconds=limits["cpu_seconds"], memory_bytes=limits["memory_bytes"], processes=limits["processes"],
            file_bytes=limits["disk_bytes"], open_files=limits["open_files"],
        )  # fmt: skip
        if self.uid is not None and self.request["mode"] != "user":
            isolation.become(self.uid)
            isolation.die_with_parent(signal.SIGKILL)  # a change of identity forgets it
        isolation.give_up_privileges()
        null = os.open("/dev/null", os.O_RDONLY)
        wanted = [null, self.output_pipe[1], self.output_pipe[1], self.source, self.token_pipe[0]]
        wanted = [os.dup(fd) for fd in [*wanted, self.report_pipe[1]]]
        # Copies above the targets, so that no target overwrites a source not copied yet.
        for target, fd in enumerate(wanted):
            os.dup2(fd, target)
        self.report_fd = len(wanted) - 1
        os.closerange(len(wanted), 1 << 12)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        python = self.request["python"]
        environment = {"HOME": box, "TMPDIR": box, "LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1"}
        flags = ["-I", "-S", "-X", "utf8", "-c", RUNNER, *self.request["packages"]]
        os.execve(python, [python, *flags], environment)


main()
