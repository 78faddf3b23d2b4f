"""YAML files that a command is given, read with errors that name the argument and the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def read_yaml(path: str | Path, argument: str) -> Any:
    """What the file holds, None where it is empty.

    Raises:
        FileNotFoundError: no such file. ValueError: no YAML in it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{argument} is {str(path)!r}: no such file")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    # Besides its own errors, PyYAML lets through those of what it builds, such as a day that no month has.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{argument} {path} is not valid YAML: {' '.join(str(error).split())}") from None
