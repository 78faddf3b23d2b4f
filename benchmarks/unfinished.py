"""A record of measurements that a run cut off leaves, for the same run on the same machine to go on from."""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path
from typing import Any

from diffmas.support.atomic import write_atomically
from diffmas.support.machine import machine

#: What a record holds, until it is complete, of the run it comes from.
KEY = "unfinished"
_ROOT = Path(__file__).resolve().parents[1]
_MACHINE_ID = Path("/etc/machine-id")


def origin(**settings: Any) -> dict[str, Any]:
    """`settings` and everything else that measurements of one record must share: code, compiled libraries, machine."""
    host = platform.node() + (_MACHINE_ID.read_text() if _MACHINE_ID.is_file() else "")
    here = {"code": _code(), "host": hashlib.sha256(host.encode()).hexdigest()}
    # As it comes back from a file.
    return json.loads(json.dumps(settings | machine() | here))


def kept(path: Path, of: dict[str, Any]) -> dict[str, Any] | None:
    """The unfinished record at `path`; None where there is none.

    Raises:
        ValueError: it is not `of` the same run.
    """
    data = json.loads(path.read_text()) if path.is_file() else {}
    if (was := data.get(KEY)) is None:
        return None
    if different := [name for name in was.keys() | of.keys() if was.get(name) != of.get(name)]:
        raise ValueError(
            f"{path.name} is the unfinished record of a run with other {', '.join(sorted(different))}; "
            "allowed: going on with the same code, settings and machine, or --fresh, which drops it"
        )
    return data


def save(path: Path, data: dict[str, Any]) -> None:
    """Replace the record at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(data, indent=1) + "\n")


def _code() -> str:
    """A digest of all Python files and compiled libraries: two states of one commit can differ."""
    digest = hashlib.sha256()
    for package in ("benchmarks", "diffmas", "diffmas_ops"):
        for path in sorted(p for p in (_ROOT / package).rglob("*") if p.suffix in (".py", ".so")):
            digest.update(f"{path.relative_to(_ROOT)} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()
