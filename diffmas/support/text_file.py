"""Text files that a command is given, read with errors that name the argument, the file and the place."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Any

_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def read_text(path: str | Path, argument: str) -> str:
    """What a UTF-8 file holds, without a byte order mark; a file called `.gz` is unpacked.

    Raises:
        FileNotFoundError: no such file. IsADirectoryError: a folder.
        ValueError: bytes that are no UTF-8, or no gzip where that is what the name says.
    """
    data, path = read_bytes(path, argument), Path(path)
    try:
        return decoded(gzip.decompress(data) if path.suffix == ".gz" else data)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{argument}: {path} is not a whole gzip file ({error})") from None
    except ValueError as error:
        raise ValueError(f"{argument}: {path} is {error}") from None


def read_bytes(path: str | Path, argument: str) -> bytes:
    """All of a file; FileNotFoundError and IsADirectoryError name the argument."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{argument} is {str(path)!r}: a folder; allowed: a file")
    if not path.is_file():
        raise FileNotFoundError(f"{argument} is {str(path)!r}: no such file")
    return path.read_bytes()


def decoded(data: bytes) -> str:
    """UTF-8 without a byte order mark; ValueError says what else it is, and where."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        found = "it begins like UTF-16" if data[:2] in _UTF16 else f"byte {data[error.start]:#04x} in line {line}"
        raise ValueError(f"not UTF-8 ({found}); allowed: UTF-8, with or without a mark") from None


def check_characters(value: Any, where: str) -> None:
    """Raise `ValueError` where a text in `value`, at any depth, has half a surrogate pair, which no UTF-8 can hold."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            code = ord(value[error.start])
            # How Python reads a byte of a terminal or a command line that is no UTF-8.
            byte = 0xDC80 <= code <= 0xDCFF
            found = f"byte {code - 0xDC00:#04x}" if byte else f"\\u{code:04x}"
            why = "no UTF-8" if byte else "half a surrogate pair"
            raise ValueError(f"{where} has {found} at character {error.start + 1}, {why}") from None
    elif isinstance(value, dict):
        for key, entry in value.items():
            check_characters(key, f"a name in {where}")
            check_characters(entry, f"{key} of {where}")
    elif isinstance(value, (list, tuple)):
        for entry in value:
            check_characters(entry, where)
