"""What a kernel offers to confine a process, through libc. Standard library alone: it runs under `python -I -S`."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
from pathlib import Path

LINUX = sys.platform == "linux"
#: Identity inside a user namespace; any but 0, so that executing a program drops all capabilities.
INNER_ID = 1000
#: Seen by programs besides Python itself; what does not exist is left out.
SYSTEM = ("/usr", "/lib", "/lib64", "/lib32", "/bin", "/nix/store", "/etc/ld.so.cache")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")

_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_RDONLY, _NOSUID, _NODEV, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_PDEATHSIG, _DUMPABLE, _SUBREAPER, _NO_NEW_PRIVS = 1, 4, 36, 38
_MOUNT_SETATTR = 442

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *args) -> None:
    if getattr(_libc, name)(*args) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def prctl(option: int, value: int) -> None:
    """Linux's prctl(2); nothing elsewhere."""
    if LINUX:
        zero = ctypes.c_ulong(0)
        _call("prctl", option, ctypes.c_ulong(value), zero, zero, zero)


def die_with_parent(number: int) -> None:
    prctl(_PDEATHSIG, number)


def adopt_orphans() -> None:
    """Descendants whose parent has gone become this process's children, whatever session they moved to."""
    prctl(_SUBREAPER, 1)


def enter_namespaces(unprivileged: int | None, *, user: bool) -> None:
    """Unshare mounts, network, IPC and host name now, process ids for children.

    With `user`, by way of a user namespace: without root, or, as root, after becoming the user `unprivileged`.
    """
    if user and unprivileged is not None:
        with contextlib.suppress(OSError):  # root of a namespace that has no other users
            become(unprivileged)
            prctl(_DUMPABLE, 1)  # otherwise its own /proc files are not its own
    uid, gid = os.geteuid(), os.getegid()
    _call("unshare", _NEWNS | _NEWUTS | _NEWIPC | _NEWPID | _NEWNET | (_NEWUSER if user else 0))
    if user:
        for name, line in (
            ("setgroups", "deny"),
            ("uid_map", f"{INNER_ID} {uid} 1"),
            ("gid_map", f"{INNER_ID} {gid} 1"),
        ):
            Path("/proc/self", name).write_text(line)


def enter_root(root: str, visible: list[str], disk_bytes: int) -> None:
    """Make `root` a file system of its own and enter it: `visible` paths, read-only, and an empty folder `/box`."""
    _mount("none", "/", None, _REC | _PRIVATE)
    _mount("tmpfs", root, "tmpfs", _NOSUID | _NODEV, "size=4m,mode=755")
    for path in _outermost([*SYSTEM, *DEVICES, *visible]):
        _show(path, root)
    os.mkdir(root + "/box")
    _mount("tmpfs", root + "/box", "tmpfs", _NOSUID | _NODEV, f"size={disk_bytes},mode=777")
    _mount("none", root, None, _REMOUNT | _RDONLY | _NOSUID | _NODEV)
    os.chroot(root)
    os.chdir("/box")


def _outermost(paths: list[str]) -> list[str]:
    kept: list[str] = []
    for path in paths:
        if os.path.lexists(path) and not any(path == k or path.startswith(k + "/") for k in kept):
            kept.append(path)
    return kept


def _show(path: str, root: str) -> None:
    target = root + path
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        Path(target).touch()
    _mount(path, target, None, _BIND | _REC)
    attributes = (ctypes.c_uint64 * 4)(_RDONLY | _NOSUID, 0, 0, 0)
    try:
        _call("syscall", ctypes.c_long(_MOUNT_SETATTR), ctypes.c_int(-100), ctypes.c_char_p(os.fsencode(target)),
              ctypes.c_uint(0x8000), ctypes.byref(attributes), ctypes.c_size_t(32))  # fmt: skip
    except OSError:  # before Linux 5.12; the mounts below `target` keep their flags
        kept = os.statvfs(target).f_flag & 0b1110
        _mount("none", target, None, _REMOUNT | _BIND | _RDONLY | _NOSUID | kept)


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    text = [None if t is None else ctypes.c_char_p(os.fsencode(t)) for t in (source, target, kind, data)]
    try:
        _call("mount", *text[:3], ctypes.c_ulong(flags), text[3])
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} ({target})") from None


def limit(*, cpu_seconds: int, memory_bytes: int, processes: int, file_bytes: int, open_files: int) -> None:
    """Resource limits of this process and its descendants; what a platform lacks is left out.

    Processes are counted per user: Linux before 5.14 counts those outside a user namespace too.
    """
    limits = {
        "RLIMIT_CPU": (cpu_seconds, cpu_seconds + 1),
        "RLIMIT_AS": (memory_bytes, memory_bytes),
        "RLIMIT_NPROC": (processes, processes),
        "RLIMIT_FSIZE": (file_bytes, file_bytes),
        "RLIMIT_NOFILE": (open_files, open_files),
        "RLIMIT_CORE": (0, 0),
    }
    for name, values in limits.items():
        with contextlib.suppress(AttributeError, OSError, ValueError):
            resource.setrlimit(getattr(resource, name), values)


def first_to_go() -> None:
    """Out of memory, the kernel ends this process before any other."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def become(uid: int) -> None:
    """Give up root for an unprivileged user id that nobody else has."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def give_up_privileges() -> None:
    """Executing a set-user-id program gains nothing from here on."""
    prctl(_NO_NEW_PRIVS, 1)


def kill_all_of(uid: int) -> None:
    """End every process of an unprivileged user id."""
    child = os.fork()
    if child == 0:
        try:
            become(uid)
            os.kill(-1, signal.SIGKILL)
        finally:
            os._exit(0)
    os.waitpid(child, 0)


def children() -> list[int]:
    """Process ids whose parent is this process, where `/proc` tells."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            if int(entry.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(entry.parent.name))
    return found
