"""Text files that a command is given, read with errors that name the argument, the file and the place."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Any

_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def read_text(path: str | Path, argument: str) -> str:
    """What a UTF-8 file holds, without a byte order mark; a file called `.gz` is unpacked.

    Raises:
        FileNotFoundError: no such file. IsADirectoryError: a folder.
        ValueError: bytes that are no UTF-8, or no gzip where that is what the name says.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{argument} is {str(path)!r}: a folder; allowed: a file")
    if not path.is_file():
        raise FileNotFoundError(f"{argument} is {str(path)!r}: no such file")
    data = path.read_bytes()
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{argument}: {path} is not a whole gzip file ({error})") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        kind = _MARKS.get(data[:2])
        line = data.count(b"\n", 0, error.start) + 1
        found = f"it begins like {kind}" if kind else f"byte {data[error.start]:#04x} in line {line}"
        raise ValueError(f"{argument}: {path} is not UTF-8 ({found}); allowed: UTF-8, with or without a mark") from None


def check_characters(value: Any, where: str) -> None:
    """Raise `ValueError` where a text in `value`, at any depth, has half a surrogate pair, which no UTF-8 can hold."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(value[error.start]):04x}"
            raise ValueError(f"{where} has {half} at character {error.start + 1}, half a surrogate pair") from None
    elif isinstance(value, dict):
        for key, entry in value.items():
            check_characters(key, f"a name in {where}")
            check_characters(entry, f"{key} of {where}")
    elif isinstance(value, (list, tuple)):
        for entry in value:
            check_characters(entry, where)
