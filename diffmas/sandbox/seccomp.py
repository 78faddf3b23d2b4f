"""System calls that programs are refused: a small filter of the kernel's, installed through prctl(2)."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys

import isolation

#: By processor: the kernel's name of its system calls and their numbers. The numbers from 424 on are shared.
_SOCKETS = {"x86_64": (0xC000003E, (41, 53)), "aarch64": (0xC00000B7, (198, 199))}
#: Reaching into other processes, and memory that belongs to none: ptrace, kcmp, process_vm_readv, process_vm_writev,
#: shmget, memfd_create; then io_uring (which opens sockets without socket(2)), pidfd_getfd and memfd_secret.
_REFUSED = {"x86_64": (101, 312, 310, 311, 29, 319), "aarch64": (117, 272, 270, 271, 194, 279)}
_REFUSED_EVERYWHERE = (425, 426, 427, 438, 447)
_SECCOMP, _FILTER = 22, 2
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_X32, _AF_UNIX = 0x40000000, 1


def available() -> bool:
    return sys.platform == "linux" and os.uname().machine in _SOCKETS and sys.maxsize > 1 << 32


def install() -> None:
    """Refuse them to this process and its descendants, for good; a socket of the family AF_UNIX is allowed.

    It needs `isolation.give_up_privileges()` first. Nothing where :func:`available` is false.
    """
    if not available():
        return
    code = program(os.uname().machine)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
    pointer = ctypes.create_string_buffer(header, len(header))
    isolation.prctl(_SECCOMP, _FILTER, ctypes.addressof(pointer))


def program(machine: str) -> bytes:
    """The filter, instructions of eight bytes each."""
    architecture, sockets = _SOCKETS[machine]
    refused = (*_REFUSED[machine], *_REFUSED_EVERYWHERE)
    lines: list[tuple[int, int | str, int | str, int]] = [
        (_LOAD, 0, 0, 4), (_EQUAL, 0, "missing", architecture), (_LOAD, 0, 0, 0), (_AT_LEAST, "missing", 0, _X32),
        *((_EQUAL, "refuse", 0, number) for number in refused),
        (_EQUAL, 1, 0, sockets[0]), (_EQUAL, 0, "allow", sockets[1]),
        (_LOAD, 0, 0, 16), (_EQUAL, "allow", "refuse", _AF_UNIX),
    ]  # fmt: skip
    places = {name: len(lines) + i for i, name in enumerate(("allow", "refuse", "missing"))}
    lines += [
        (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _ERRNO | errno.EPERM), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS),
    ]  # fmt: skip
    jump = lambda at, to: places[to] - at - 1 if isinstance(to, str) else to  # noqa: E731
    return b"".join(struct.pack("HBBI", c, jump(i, t), jump(i, f), k) for i, (c, t, f, k) in enumerate(lines))
