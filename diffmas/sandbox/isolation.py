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
_PDEATHSIG, _DUMPABLE, _CAPABILITY_DROP, _SUBREAPER, _NO_NEW_PRIVS = 1, 4, 24, 36, 38
_PTRACE = 19
_MOUNT_SETATTR = 442

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *args) -> None:
    if getattr(_libc, name)(*args) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def prctl(option: int, value: int, more: int = 0) -> None:
    """Linux's prctl(2); nothing elsewhere."""
    if LINUX:
        zero = ctypes.c_ulong(0)
        _call("prctl", option, ctypes.c_ulong(value), ctypes.c_ulong(more), zero, zero)


def die_with_parent(number: int) -> None:
    prctl(_PDEATHSIG, number)


def adopt_orphans() -> None:
    """Descendants whose parent has gone become this process's children, whatever session they moved to."""
    prctl(_SUBREAPER, 1)


def enter_namespaces(unprivileged: int | None, *, user: bool) -> int | None:
    """Unshare mounts, network, IPC and host name now, process ids for children. Returns the user to become, if any.

    With `user`, by way of a user namespace. As root, that one has root, who alone may read a Python below root's home,
    and the user `unprivileged`, who is to run programs.
    """
    kinds = _NEWNS | _NEWUTS | _NEWIPC | _NEWPID | _NEWNET
    if not user:
        _call("unshare", kinds)
        return unprivileged
    uid, gid = os.geteuid(), os.getegid()
    helper, start = _map_ids(os.getpid(), f"0 0 1\n{INNER_ID} {unprivileged} 1") if unprivileged is not None else (0, 0)
    try:
        _call("unshare", kinds | _NEWUSER)
    finally:
        if helper:
            os.close(start)
            mapped = os.waitpid(helper, 0)[1] == 0
    if helper and mapped:
        return INNER_ID
    for name, line in (("setgroups", "deny"), ("uid_map", f"{INNER_ID} {uid} 1"), ("gid_map", f"{INNER_ID} {gid} 1")):
        Path("/proc/self", name).write_text(line)
    return None


def _map_ids(pid: int, lines: str) -> tuple[int, int]:
    """A child that stays outside and, once the descriptor is closed, gives the user namespace of `pid` its ids.

    It fails for root of a namespace that has no other users.
    """
    waits, start = os.pipe()
    helper = os.fork()
    if helper == 0:
        try:
            os.close(start)
            os.read(waits, 1)
            for name in ("uid_map", "gid_map"):
                Path(f"/proc/{pid}/{name}").write_text(lines)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(waits)
    return helper, start


def new_process_ids() -> None:
    """Children of this process get process ids of their own, and see no others."""
    _call("unshare", _NEWPID)


def enter_root(root: str, visible: list[str], disk_bytes: int) -> None:
    """Make `root` a file system of its own and enter it: `visible` paths, read-only, and an empty folder `/box`."""
    _mount("none", "/", None, _REC | _PRIVATE)
    _mount("tmpfs", root, "tmpfs", _NOSUID | _NODEV, "size=4m,mode=755")
    for path in _outermost([*SYSTEM, *DEVICES, *visible]):
        _show(path, root)
    # One file system, so that one limit holds for both.
    os.mkdir(root + "/files")
    _mount("tmpfs", root + "/files", "tmpfs", _NOSUID | _NODEV, f"size={disk_bytes},mode=755")
    for source, target in (("/files/box", "/box"), ("/files/shm", "/dev/shm")):
        for path in (source, target):
            os.mkdir(root + path)
        os.chmod(root + source, 0o777)
        _mount(root + source, root + target, None, _BIND)
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
    """Executing a set-user-id program gains nothing from here on, nor does a root reach into other processes."""
    prctl(_NO_NEW_PRIVS, 1)
    with contextlib.suppress(OSError):  # only who has capabilities can drop one
        prctl(_CAPABILITY_DROP, _PTRACE)


def keep_private() -> None:
    """Other processes of the same user cannot read this one's memory and descriptors."""
    prctl(_DUMPABLE, 0)


def private(path: str) -> bool:
    """Whether a folder above `path` keeps other users out."""
    return any(not os.stat(above).st_mode & 1 for above in Path(path).parents)


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
