"""JSON as every reader understands it: Python's own writer puts NaN and Infinity, which are no JSON."""

from __future__ import annotations

import json
import math
from typing import Any


def to_json(value: Any, **options: Any) -> str:
    """`json.dumps(value, **options)`, with null for a number that is not finite."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(_without(value), allow_nan=False, **options)


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
