"""YAML files that a command is given, read with errors that name the argument and the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from diffmas.support.text_file import check_characters, decoded, read_bytes


class _Loader(yaml.SafeLoader):
    """A safe loader to which a name given twice is an error, not its last value."""

    def construct_mapping(self, node, deep=False):
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise yaml.constructor.ConstructorError(None, None, f"{twice!r} is there more than once", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path, argument: str) -> Any:
    """What the file holds, None where it is empty.

    Raises:
        FileNotFoundError: no such file. IsADirectoryError: a folder. ValueError: no UTF-8, or no YAML in it.
    """
    data = read_bytes(path, argument)
    try:
        value = yaml.load(decoded(data), _Loader)
        check_characters(value, "the file")
        return value
    # Besides its own errors, PyYAML lets through those of what it builds, such as a day that no month has.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{argument} {path} is not valid YAML: {' '.join(str(error).split())}") from None
