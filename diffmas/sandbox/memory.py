"""How much memory a process and all its descendants use together, as Linux's `/proc` tells."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

_PAGE = os.sysconf("SC_PAGE_SIZE")


def descendants(pid: int) -> list[int]:
    """Process ids of all that come from `pid`, without itself; none where there is no `/proc`."""
    found, todo = [], [pid]
    while todo:
        parent = todo.pop()
        children = _children(parent)
        found += children
        todo += children
    return found


def _children(pid: int) -> list[int]:
    found: list[int] = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            found += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    except FileNotFoundError:
        if os.path.exists(f"/proc/{pid}/task/{pid}"):  # a kernel that keeps no such list
            return _children_by_search(pid)
    except OSError:
        pass
    return found


def _children_by_search(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            if int(entry.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(entry.parent.name))
    return found


def exceeds(pid: int, most: int) -> bool:
    """Whether the descendants of `pid` use more than `most` bytes, what they share counted once."""
    pids = descendants(pid)
    # Cheap and never less than the true sum; only beyond the limit does it pay to look closely.
    return sum(map(_resident, pids)) > most and sum(map(_proportional, pids)) > most


def _resident(pid: int) -> int:
    with contextlib.suppress(OSError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    return 0


def _proportional(pid: int) -> int:
    with contextlib.suppress(OSError):
        if found := re.search(r"^Pss: +(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M):
            return int(found[1]) << 10
    return _resident(pid)
