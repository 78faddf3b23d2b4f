"""Runs untrusted Python programs, one process each, confined as far as the kernel allows.

What confines a program, strongest first:

- ``root`` (root with CAP_SYS_ADMIN) and ``user`` (unprivileged user namespaces): process ids, mounts, network and IPC
  of its own; it sees Python, the system's libraries and an empty folder, all else is not there.
- ``uid`` (root without namespaces, as in a plain container): an unprivileged user id of its own. It reads what every
  user may read and writes where every user may write.
- ``none``: resource limits alone. A program may signal and change whatever its user may. Only if asked for.

All of them limit time, memory, processes, files and output, start from an empty environment, and end every process a
program leaves behind. On Linux (x86-64, AArch64) no program opens a socket but of the family AF_UNIX. On other systems
than Linux there is ``none`` only, and ``uid`` for root.

Tests run in a process of their own, which never runs the program's code: they call the program, and what comes back is
built anew from plain values. A program can neither see, stop nor answer for its tests.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

SUPERVISOR = Path(__file__).with_name("supervisor.py")
#: What confines a program, by mode.
MODES = {
    "root": "pid, mount, network and ipc namespaces, user id of its own, resource limits",
    "user": "user, pid, mount, network and ipc namespaces, resource limits",
    "uid": "user id of its own, resource limits; no namespaces: world-writable folders are open",
    "none": "resource limits alone; signals and files are open",
}
_GRACE_SECONDS = 30


class SandboxError(RuntimeError):
    """The sandbox itself failed, or there is none on this machine; says nothing about the program."""


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    Args:
        seconds: wall-clock time. cpu_seconds: processor time of each of its processes.
        memory_bytes: address space of each of its processes, and memory in use of all together.
        processes: processes and threads at once.
        disk_bytes: all its files together (one file, without a mount namespace). open_files: at once.
        output_bytes: what it prints, standard output and error together; a program that prints more is ended.
    """

    seconds: float = 10.0
    cpu_seconds: int = 10
    memory_bytes: int = 2 << 30
    processes: int = 16
    disk_bytes: int = 32 << 20
    open_files: int = 64
    output_bytes: int = 1 << 20

    def __post_init__(self):
        for name, value in asdict(self).items():
            if value <= 0:
                raise ValueError(f"{name} is {value}; allowed: numbers > 0")


@dataclass(frozen=True)
class Result:
    """How a program ended.

    Args:
        passed: it ran to its last line, and its tests ran to theirs, within its limits.
        reason: "passed", "exception", "exit" (it left before the end), "signal", "timeout", "memory", "output".
        detail: the exception's name, the exit code, the signal; empty otherwise.
        output: what it printed, standard output and error, up to the limit.
        seconds: wall-clock time.
        isolation: what confined it, one of :data:`MODES`' values.
    """

    passed: bool
    reason: str
    detail: str
    output: str
    seconds: float
    isolation: str


def run(
    program: str | Sequence[str],
    limits: Limits | None = None,
    *,
    tests: str = "",
    context: str = "",
    entry_point: str | None = None,
    packages: Sequence[str] = (),
    mode: str | None = None,
) -> Result:
    """Run `program`, Python source, and then its tests. May be called from several threads.

    Args:
        program: one source, or several that run one after the other in the same module, so that what the first one
            leaves open (a string, a bracket, a block) cannot swallow the next. What it asserts of itself is its own
            word: code that is not trusted is judged by `tests`.
        tests: Python source that runs in another process. A name it does not define stands for the program's:
            calls go to the program and plain values come back (:mod:`diffmas.sandbox.wire`).
        context: source that goes before both program and tests; tests use its names but for `entry_point`.
        entry_point: a name that is always the program's.
        packages: top-level packages of this environment, which the program may import besides the standard library.
        mode: one of :data:`MODES`; default: the strongest this machine allows, never "none".

    Raises:
        SandboxError: no confinement, or the mode asked for does not work here.
        ValueError: an unknown mode, or a package that is not installed.
    """
    if mode is None:
        mode = best_mode()
    elif mode not in MODES:
        raise ValueError(f"mode is {mode!r}; allowed: {', '.join(MODES)}")
    limits = limits or Limits()
    locations = [_package(name) for name in packages]
    with _folder(mode) as folder:
        outcome = _supervise(
            {
                "parts": [context, *([program] if isinstance(program, str) else program)],
                "tests": tests,
                "context": context,
                "entry_point": entry_point,
                "mode": mode,
                "folder": folder,
                "python": os.path.realpath(sys.executable),
                "packages": list(dict.fromkeys(os.path.dirname(paths[0]) for paths in locations)),
                "base": os.path.realpath(sys.base_prefix),
                "visible": [os.path.realpath(sys.base_prefix), *(path for paths in locations for path in paths)],
                "limits": asdict(limits),
            },
            limits.seconds + _GRACE_SECONDS,
        )
    if "error" in outcome:
        raise SandboxError(f"mode {mode} does not work on this machine: {outcome['error']}")
    reason, detail = _reason(outcome)
    return Result(reason == "passed", reason, detail, outcome["output"], outcome["seconds"], MODES[mode])


def run_many(
    programs: Iterable[str | Sequence[str]],
    limits: Limits | None = None,
    *,
    workers: int | None = None,
    advance: Callable[[int], None] = lambda n: None,
    **options,
) -> list[Result]:
    """Results of many programs in their order, `workers` at a time; `advance(n)` is told whenever n more are done.

    `workers` defaults to the number of processors; further options are those of :func:`run`.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}; allowed: integers ≥ 1")
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        futures = [pool.submit(run, program, limits, **options) for program in programs]
        try:
            for future in as_completed(futures):
                future.result()
                advance(1)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return [future.result() for future in futures]


@functools.cache
def best_mode() -> str:
    """The strongest mode that works here.

    Raises:
        SandboxError: none does but "none", which has to be asked for.
    """
    reasons = []
    linux, root = sys.platform == "linux", hasattr(os, "geteuid") and os.geteuid() == 0
    for mode in [m for m, there in (("root", linux and root), ("user", linux), ("uid", root)) if there]:
        try:
            if (result := run("pass", mode=mode)).passed:
                return mode
            reasons.append(f"{mode}: {result.reason} {result.detail} {result.output}".strip())
        except SandboxError as error:
            reasons.append(str(error))
    raise SandboxError(
        "programs cannot be confined on this machine"
        + "".join(f"; {reason}" for reason in reasons)
        + ". Linux needs unprivileged user namespaces, or root; run elsewhere in a container, or accept "
        'mode="none" (resource limits alone)'
    )


def _supervise(request: dict, timeout: float) -> dict:
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(SUPERVISOR)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={}, start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(json.dumps(request).encode(), timeout)
    except BaseException as error:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=15)
        process.kill()
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            raise SandboxError(f"the supervisor did not answer within {timeout:g} s") from None
        raise
    try:
        return json.loads(out)
    except ValueError:
        raise SandboxError(f"the supervisor failed: {err.decode(errors='replace')[-500:]}") from None


def _reason(outcome: dict) -> tuple[str, str]:
    if outcome["ended"] != "exit":
        return outcome["ended"], ""
    # Only the judge writes a verdict; without one, whoever of the two ended before it says why.
    reason, detail = outcome["verdict"] or ("gone", "")
    if reason != "gone":
        return ("memory", "MemoryError") if detail == "MemoryError" else (reason, detail)
    statuses = outcome["statuses"]
    if "program" in statuses and (outcome["verdict"] or "judge" not in statuses):
        status = statuses["program"]
    elif outcome["verdict"]:
        return "exit", "it has closed its connection"
    else:
        status = statuses.get("judge", -9)
    if status < 0:
        # Signal 24 is SIGXCPU; the processor-time limit sends it.
        return ("timeout", "processor time") if status == -24 else ("signal", str(-status))
    return "exit", str(status)


@contextlib.contextmanager
def _folder(mode: str):
    """An empty folder: the program's own, or what its file system is mounted on."""
    path = tempfile.mkdtemp(prefix="diffmas-sandbox-")
    try:
        if mode in ("user", "uid") and os.geteuid() == 0:
            os.chmod(path, 0o777)
        yield path
    finally:
        # Not shutil: a program can nest folders deeper than Python recurses.
        if subprocess.run(["rm", "-rf", path], stderr=subprocess.DEVNULL, check=False).returncode:
            subprocess.run(["chmod", "-R", "u+rwx", path], check=False)
            subprocess.run(["rm", "-rf", path], check=False)


@functools.cache
def _package(name: str) -> list[str]:
    """Paths of an installed top-level package: itself, and the shared libraries that wheels keep beside it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.origin:
        raise ValueError(f"packages has {name!r}, which is not installed")
    path = Path(spec.submodule_search_locations[0] if spec.submodule_search_locations else spec.origin)
    beside = path.with_name(f"{name}.libs")
    return [str(p) for p in (path, beside) if p.exists()]
