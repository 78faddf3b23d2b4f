"""Starts one program and its judge in a sandbox, watches them and ends all they leave behind: a script that
`diffmas.sandbox` runs.

A request (JSON) comes in on standard input, the outcome (JSON) goes out on standard output. It runs in a process of
its own because namespaces, limits and identities belong to a process. Standard library alone.

The judge is a fork of this process and never runs the program's code; the program is an interpreter of its own. They
have two pipes between them; the descriptor of the verdict is the judge's alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import isolation
import judge
import memory
import seccomp
import wire

RUNNER = (
    "import sys, types\nsys.modules['wire'] = types.ModuleType('wire')\n"
    f"exec({Path(wire.__file__).read_text()!r}, sys.modules['wire'].__dict__)\n"
    + Path(__file__).with_name("runner.py").read_text()
)
SETUP_FAILED = b"setup: "
#: How long the second of judge and program may take to end after the first, and between two looks at the memory.
_LAST_SECONDS, _MEMORY_SECONDS = 0.5, 0.05


class Interrupted(Exception):
    pass


def main() -> None:
    request = json.load(sys.stdin)
    signal.signal(signal.SIGTERM, _interrupt)
    isolation.die_with_parent(signal.SIGTERM)
    isolation.keep_private()
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
        own = os.getpid() % 15_000 if os.geteuid() == 0 and request["mode"] != "none" else None
        self.uid, self.judge_uid = (None, None) if own is None else (50_000 + own, 30_000 + own)
        self.output, self.verdict, self.status = b"", b"", b""
        self.children: dict[int, str] = {}

    def run(self) -> dict:
        with tempfile.TemporaryFile() as source:
            parts = [part.encode(errors="surrogatepass") for part in self.request["parts"]]
            source.write(" ".join(str(len(part)) for part in parts).encode() + b"\n" + b"".join(parts))
            source.seek(0)
            return self._run(source.fileno())

    def _run(self, source: int) -> dict:
        self.source = source
        self.output_pipe, self.verdict_pipe, self.status_pipe, self.alive = (os.pipe() for _ in "1234")
        self.questions, self.answers = os.pipe(), os.pipe()
        self.folders = self._private_folders()
        wake = os.pipe()
        for fd in (*wake, self.output_pipe[0], self.verdict_pipe[0], self.status_pipe[0]):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(wake[1])
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        if self.namespaces:
            inner = isolation.enter_namespaces(self.uid, user=self.request["mode"] == "user")
            if self.request["mode"] == "user":
                self.uid = self.judge_uid = inner
            isolation.die_with_parent(signal.SIGTERM)
        else:
            isolation.adopt_orphans()
        started = time.monotonic()
        try:
            if self.namespaces:
                self._start("first", self._first)
            else:
                self._start("judge", self._judge)
                self._start("program", self._program)
            for fd in (self.output_pipe[1], self.verdict_pipe[1], self.status_pipe[1], *self.questions, *self.answers):
                os.close(fd)
            ended = self._watch(wake[0], started + self.limits["seconds"])
        finally:
            self._end()
        for fd in (self.output_pipe[0], self.verdict_pipe[0], self.status_pipe[0]):
            for _ in range(4):
                self._read(fd)
        if SETUP_FAILED in self.status:
            raise OSError(self.status.partition(SETUP_FAILED)[2].partition(b"\n")[0].decode(errors="replace"))
        return {
            "ended": ended,
            "verdict": json.loads(self.verdict or "null"),
            "statuses": {name: int(status) for name, status in map(str.split, self.status.decode().splitlines())},
            "output": self.output[: self.limits["output_bytes"]].decode(errors="replace"),
            "seconds": time.monotonic() - started,
        }

    def _watch(self, wake: int, deadline: float) -> str:
        """Why it ended: "exit", "timeout", "output" or "memory"."""
        fds = {self.output_pipe[0], self.verdict_pipe[0], self.status_pipe[0], wake}
        look, last = time.monotonic() + _MEMORY_SECONDS, None
        while True:
            now = time.monotonic()
            if now >= deadline:
                return "timeout"
            if last is not None and now >= last:
                return "exit"
            if now >= look:
                if memory.exceeds(os.getpid(), self.limits["memory_bytes"]):
                    return "memory"
                look = time.monotonic() + _MEMORY_SECONDS
            until = min(deadline, look, last or deadline)
            ready, _, _ = select.select(list(fds), [], [], max(until - time.monotonic(), 0))
            fds -= {fd for fd in ready if fd != wake and not self._read(fd)}
            if len(self.output) > self.limits["output_bytes"]:
                return "output"
            with contextlib.suppress(BlockingIOError):
                os.read(wake, 512)
            self._reap()
            judged, gone = self.verdict_pipe[0] not in fds, b"program " in self.status
            # Who gave a verdict has seen the program as it was; only of a program that is gone is more to be heard.
            if (judged and self.verdict and b'"gone"' not in self.verdict) or (judged and gone) or not self.children:
                return "exit"
            if (judged or gone) and last is None:
                last = now + _LAST_SECONDS

    def _read(self, fd: int) -> bool:
        """Take what `fd` holds; False at its end."""
        try:
            data = os.read(fd, 1 << 16)
        except BlockingIOError:
            return True
        if fd == self.output_pipe[0]:
            self.output += data
        elif fd == self.verdict_pipe[0]:
            self.verdict += data
        else:
            self.status += data
        return bool(data)

    def _reap(self) -> None:
        """Take the exit codes of children; they are negative for a signal."""
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                name = self.children.pop(found[0], None)
                if name in ("judge", "program"):
                    self.status += b"%s %d\n" % (name.encode(), os.waitstatus_to_exitcode(found[1]))

    def _end(self) -> None:
        """End every process that was started. The first of a process-id namespace takes all others along."""
        started = list(self.children)
        for child in started:
            for kill in (os.killpg, os.kill):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    kill(child, signal.SIGKILL)
        if self.namespaces:
            for child in started:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(child, 0)
            return
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            for uid in (self.uid, self.judge_uid):
                if uid is not None:
                    isolation.kill_all_of(uid)
            for pid in memory.descendants(os.getpid()):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:
                return
            time.sleep(0.002)

    def _start(self, name: str, run) -> int:
        """A child that is `run`; what it cannot do is reported as a failure of the sandbox."""
        child = os.fork()
        if child:
            self.children[child] = name
            return child
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGTERM, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            os.setsid()
            isolation.die_with_parent(signal.SIGKILL)
            if name != "program" or not self.namespaces:
                self._end_with_supervisor()
            isolation.first_to_go()
            run()
        except BaseException as error:
            os.write(self.status_pipe[1], SETUP_FAILED + str(error).encode()[:1024] + b"\n")
        finally:
            os._exit(1)

    def _end_with_supervisor(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self.alive[1])
        os.set_blocking(self.alive[0], False)
        with contextlib.suppress(BlockingIOError):
            if os.read(self.alive[0], 1) == b"":
                os._exit(1)  # the supervisor went before its death could be heard of

    def _first(self) -> None:
        """The first process of the namespaces. The program's process ids are a namespace within: it sees no judge."""
        self.children = {}
        isolation.enter_root(self.request["folder"], self.request["visible"], self.limits["disk_bytes"])
        self._start("judge", self._judge)
        isolation.new_process_ids()
        self._start("inner", self._inner)
        self._wait()

    def _inner(self) -> None:
        self.children = {}
        self._start("program", self._program)
        self._wait()

    def _wait(self) -> None:
        """Be the first process of a namespace: wait for all others and pass on how the program's and judge's ended."""
        _close_but(self.status_pipe[1])
        while True:
            try:
                pid, status = os.wait()
            except ChildProcessError:
                os._exit(0)
            if (name := self.children.get(pid)) in ("judge", "program"):
                os.write(self.status_pipe[1], b"%s %d\n" % (name.encode(), os.waitstatus_to_exitcode(status)))

    def _private_folders(self) -> dict[str, int]:
        """Folders to import from that a user id of its own cannot reach by name, and descriptors to reach them by."""
        if self.request["mode"] != "uid":
            return {}
        folders = dict.fromkeys([self.request["base"], *self.request["packages"]])
        return {path: os.open(path, os.O_RDONLY) for path in folders if isolation.private(path)}

    def _reached(self, path: str, fds: dict[str, int]) -> str:
        """`path`, by way of a descriptor of a folder above it, if there is one."""
        for folder, fd in fds.items():
            if path == folder or path.startswith(folder + "/"):
                return f"/proc/self/fd/{fd}{path[len(folder) :]}"
        return path

    def _judge(self) -> None:
        self._confine("/", self.judge_uid)
        isolation.keep_private()
        null = os.open("/dev/null", os.O_RDONLY)
        for target, fd in enumerate((null, self.output_pipe[1], self.output_pipe[1])):
            os.dup2(fd, target)
        read, write, verdict = self.answers[0], self.questions[1], self.verdict_pipe[1]
        _close_but(read, write, verdict, *self.folders.values())
        library = [path for path in sys.path if path != os.path.dirname(os.path.abspath(__file__))]
        sys.path[:] = [self._reached(path, self.folders) for path in [*library, *self.request["packages"]]]
        sys.path_importer_cache.clear()
        judge.main(self.request, read, write, verdict)

    def _program(self) -> None:
        box = "/box" if self.namespaces else self.request["folder"]
        self._confine(box, self.uid)
        null = os.open("/dev/null", os.O_RDONLY)
        wanted = [null, self.output_pipe[1], self.output_pipe[1], self.source, self.questions[0], self.answers[1]]
        # Copies above the targets, so that no target overwrites a source not copied yet.
        wanted = [os.dup(fd) for fd in [*wanted, *self.folders.values()]]
        status = os.dup(self.status_pipe[1])
        for target, fd in enumerate(wanted):
            os.dup2(fd, target)
        self.status_pipe = (-1, status)
        _close_but(*range(len(wanted)), status)
        fds = {path: 6 + i for i, path in enumerate(self.folders)}
        python, *packages = (self._reached(p, fds) for p in (self.request["python"], *self.request["packages"]))
        environment = {"HOME": box, "TMPDIR": box, "LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1"}
        os.execve(python, [python, "-I", "-S", "-X", "utf8", "-c", RUNNER, *packages], environment)

    def _confine(self, folder: str, uid: int | None) -> None:
        limits = self.limits
        os.chdir(folder)
        isolation.limit(
            cpu_seconds=limits["cpu_seconds"], memory_bytes=limits["memory_bytes"], processes=limits["processes"],
            file_bytes=limits["disk_bytes"], open_files=limits["open_files"],
        )  # fmt: skip
        if uid is not None:
            isolation.become(uid)
            isolation.die_with_parent(signal.SIGKILL)  # a change of identity forgets it
        isolation.give_up_privileges()
        seccomp.install()


def _close_but(*kept: int) -> None:
    """Close every descriptor besides `kept` and the standard ones."""
    low = 3
    for fd in sorted({fd for fd in kept if fd >= low}):
        os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, 1 << 12)


main()
