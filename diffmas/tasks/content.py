"""Fingerprints of a task's items, by which a file that has changed, or moved, is told."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from diffmas.tasks.base import Item, Task
from diffmas.tasks.source import Items

#: Items that are looked at where they are drawn, not read: the task's settings decide the others.
_DRAWN = 256


def fingerprint(items: Sequence[Item]) -> str:
    """The same for equal items in equal order, in every process."""
    count = len(items) if isinstance(items, (list, Items)) else min(len(items), _DRAWN)
    digest = hashlib.sha256(str(len(items)).encode())
    for i in range(count):
        digest.update(json.dumps(dict(items[i]), sort_keys=True, default=repr).encode(errors="surrogatepass"))
    return digest.hexdigest()


def fingerprints(task: Task) -> dict[str, str]:
    return {"train": fingerprint(task.train), "eval": fingerprint(task.eval)}
