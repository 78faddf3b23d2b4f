"""YAML files that a command is given, read with errors that name the argument and the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from diffmas.text_file import check_characters, decoded, read_bytes


def read_yaml(path: str | Path, argument: str) -> Any:
    """What the file holds, None where it is empty.

    Raises:
        FileNotFoundError: no such file. IsADirectoryError: a folder. ValueError: no UTF-8, or no YAML in it.
    """
    data = read_bytes(path, argument)
    try:
        value = yaml.safe_load(decoded(data))
        check_characters(value, "the file")
        return value
    # Besides its own errors, PyYAML lets through those of what it builds, such as a day that no month has.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{argument} {path} is not valid YAML: {' '.join(str(error).split())}") from None
