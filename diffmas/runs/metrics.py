"""What a training logged, as its run's folder keeps it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

#: Entry of a restating step: its loss, which is not the method's.
RESTATING_LOSS = "restating_loss"
#: What an entry calls the norms of gradients at latent steps, `[agent][step]`.
LATENT_NORMS = "latent_gradient_norms"


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The entries of a `metrics.jsonl` without a torn last line; none where there is no such file.

    Raises:
        ValueError: a line that is no entry, named.
    """
    path, entries = Path(path), []
    content = path.read_bytes() if path.is_file() else b""
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), 1):
        try:
            entries.append({"step": json.loads(line)["step"], **json.loads(line)})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} line {number} is no entry of metrics ({type(error).__name__}: {error})") from None
    return entries
