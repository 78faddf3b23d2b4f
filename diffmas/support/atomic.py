"""Files that are replaced as a whole."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from diffmas.support.failures import writing


def write_atomically(path: str | Path, text: str) -> None:
    """Replace a file by one with `text`; a reader, or a kill at any moment, sees the old one or the new one."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with writing(path), os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files for their owner alone.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _umask() -> int:
    os.umask(mask := os.umask(0))
    return mask
