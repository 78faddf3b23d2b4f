"""Folders that results go to, looked at before the work whose results they are."""

from __future__ import annotations

import os
from pathlib import Path


def check_output(folder: str | Path, argument: str) -> None:
    """Raise `OSError` where `folder` is not, or cannot be made, a folder that files can be written to."""
    folder = Path(folder)
    there = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    if not there.is_dir():
        raise NotADirectoryError(f"{argument} is {str(folder)!r}, and {there} is a file; allowed: a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{argument} is {str(folder)!r}, and {there} cannot be written to; allowed: one that can")
