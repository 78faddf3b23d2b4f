"""A checker of one's own: `module:function`, called with the text of a prediction and the item."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffmas.answers import reasoning, text

#: The final answer, as for text.
extract = text.extract


def load(name: str) -> Callable[[str, Mapping[str, Any]], bool]:
    """The check that `name` ("module:function") is, importable from the working folder.

    It sees predictions without reasoning blocks, and none that never ends its block. What it raises, and what it
    returns other than True or False, becomes a `ValueError` that names it.
    """
    module, mark, function = name.partition(":")
    if not (mark and function.isidentifier() and all(part.isidentifier() for part in module.split("."))):
        raise ValueError(f"checker is {name!r}; allowed: module:function, two Python names")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), function, None)
    except Exception as error:  # whatever a module does when it is imported
        raise ValueError(f"checker is {name!r}: importing {module} raised {type(error).__name__}: {error}") from None
    finally:
        sys.path.remove(here)
    if not callable(found):
        raise ValueError(f"checker is {name!r}: {module} has no function {function}; allowed: one of (text, item)")

    def check(prediction: str, item: Mapping[str, Any]) -> bool:
        answer = reasoning.removed(prediction)
        if not answer.strip():
            return False
        try:
            right = found(answer, item)
        except Exception as error:  # whatever a function does
            raise ValueError(f"checker {name!r} raised {type(error).__name__}: {error} on {answer[:80]!r}") from error
        if not isinstance(right, bool):
            raise ValueError(f"checker {name!r} returned {right!r} on {answer[:80]!r}; allowed: True or False")
        return right

    return check
