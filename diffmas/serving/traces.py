"""Traces in files, one row a file: what a decoding engine in another process needs to go on behind them.

A file is in the safetensors format: `keys.I` and `values.I` of layer I, `[columns, num_kv_heads, head_dim]`, and in its
metadata what wrote them. Its name is a digest of its content, which is also the salt under which an engine may cache
what it computes behind it: two rows' placeholder tokens are the same, their traces are not.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffmas.support.failures import reading, writing
from diffmas_ops import KVTrace
from diffmas_ops.storage import Stack

#: Of the format, in every file's metadata.
FORMAT = "diffmas-trace-1"
_SUFFIX = ".safetensors"
_ID = re.compile(r"[0-9a-f]{64}")


def check_id(trace_id: object) -> str:
    """`trace_id` itself.

    Raises:
        ValueError: anything but the 64 hexadecimal digits that name a trace, a path above all.
    """
    if not isinstance(trace_id, str) or not _ID.fullmatch(trace_id):
        raise ValueError(f"trace is {trace_id!r}; allowed: the 64 hexadecimal digits that name one, never a path")
    return trace_id


def cache_salt(trace_id: str) -> str:
    """What an engine's prefix cache has to keep apart this trace's blocks by: they hold nothing else's tokens."""
    return f"trace-{check_id(trace_id)}"


@dataclass(frozen=True)
class StoredTrace:
    """The name of a row's trace in a store, and how many columns it has."""

    id: str
    length: int

    @property
    def cache_salt(self) -> str:
        """See :func:`cache_salt`."""
        return cache_salt(self.id)


@dataclass(frozen=True)
class Layout:
    """What all traces of a model have in common.

    Attributes:
        model: a fingerprint of the model whose keys and values they are.
        shapes: `(num_kv_heads, head_dim)` of every layer.
        dtype: of keys and values.
    """

    model: str
    shapes: tuple[tuple[int, int], ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, trace: KVTrace, model: str) -> Layout:
        """That of `trace`, which `model` wrote."""
        return cls(model, trace.storage.shapes, trace.dtype)

    def check(self, found: Layout, what: str) -> None:
        """Raise `ValueError` where `found`, that of `what`, is another."""
        for name in ("model", "shapes", "dtype"):
            if (other := getattr(found, name)) != (own := getattr(self, name)):
                raise ValueError(f"{what}: {name} is {other}; allowed: {own}, as the model that decodes has it")


class TraceStore:
    """A folder of traces, which several threads may use.

    Args:
        folder: made where there is none.
        max_bytes: of all files together; None: as many as the disk takes.

    Raises:
        ValueError: `max_bytes` below 1.
    """

    def __init__(self, folder: str | Path, *, max_bytes: int | None = None):
        if max_bytes is not None and max_bytes < 1:
            raise ValueError(f"max_bytes is {max_bytes}; allowed: integers ≥ 1, or None")
        self.folder, self._most = Path(folder), max_bytes
        self.folder.mkdir(parents=True, exist_ok=True)
        self._uses: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._sizes: dict[str, int] = {}

    @property
    def bytes(self) -> int:
        """Of all traces that are in use."""
        return sum(self._sizes.values())

    def path(self, trace_id: str) -> Path:
        """Where a trace is, inside the folder."""
        return self.folder / f"{check_id(trace_id)}{_SUFFIX}"

    def put(self, trace: KVTrace, row: int, model: str) -> StoredTrace:
        """Keep row `row` of `trace`, which the model with fingerprint `model` wrote; what is there already is shared.

        Raises:
            ValueError: recurrent states, which no engine here continues, an empty row, or no room for it.
            OSError: a file that cannot be written.
        """
        if trace.states:
            raise ValueError("the trace has states of recurrent layers; allowed: keys and values alone")
        length = trace.host_lengths[row]
        if length < 1:
            raise ValueError(f"row {row} of the trace is empty; allowed: ≥ 1 columns")
        layout, tensors = Layout.of(trace, model), {}
        for layer in range(trace.num_layers):
            for name, x in zip(("keys", "values"), trace.storage.layer(layer), strict=True):
                tensors[f"{name}.{layer}"] = x[row, :, :length].detach().transpose(0, 1).contiguous().cpu()
        trace_id = _digest(layout, length, tensors)
        size = sum(x.nbytes for x in tensors.values())
        with self._lock:
            if not self._uses[trace_id]:
                if self._most is not None and self.bytes + size > self._most:
                    raise ValueError(
                        f"the traces take more than max_bytes ({self._most}), of which {self.bytes} are used, with one "
                        f"of {size}; allowed: more, or fewer rows at once"
                    )
                self._write(trace_id, layout, length, tensors)
                self._sizes[trace_id] = size
            self._uses[trace_id] += 1
        return StoredTrace(trace_id, length)

    def release(self, trace: StoredTrace) -> None:
        """One of its rows is done; the file goes with the last."""
        with self._lock:
            self._uses[trace.id] -= 1
            if self._uses[trace.id] <= 0:
                del self._uses[trace.id], self._sizes[trace.id]
                self.path(trace.id).unlink()

    def _write(self, trace_id: str, layout: Layout, length: int, tensors: dict[str, Tensor]) -> None:
        path = self.path(trace_id)
        handle, temporary = tempfile.mkstemp(dir=self.folder, prefix=".")
        os.close(handle)
        try:
            with writing(path):
                save_file(tensors, temporary, metadata=_metadata(layout, length))
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def read_trace(path: str | Path, length: int | None = None, layout: Layout | None = None) -> tuple[Layout, list[Stack]]:
    """What a file says of itself, and each layer's keys and values `[columns, num_kv_heads, head_dim]`.

    Args:
        length, layout: what they have to be.

    Raises:
        FileNotFoundError: no such trace. ValueError: one that cannot be read, or is not of `length` and `layout`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no trace {path.stem}; allowed: one that is in the folder of traces")
    with reading(f"trace {path.stem}"), safe_open(path, "pt") as file:
        found, columns = _described(file.metadata() or {})
        if layout is not None:
            layout.check(found, f"trace {path.stem}")
        if length is not None and columns != length:
            raise ValueError(f"trace {path.stem} has {columns} columns; allowed: {length}, as the request has it")
        names = {f"{name}.{layer}" for name in ("keys", "values") for layer in range(len(found.shapes))}
        if set(file.keys()) != names:
            raise ValueError(f"trace {path.stem} holds {sorted(file.keys())}; allowed: {sorted(names)}")
        layers = []
        for layer, shape in enumerate(found.shapes):
            stack = Stack(*(file.get_tensor(f"{name}.{layer}") for name in ("keys", "values")))
            for name, x in zip(("keys", "values"), stack, strict=True):
                if tuple(x.shape) != (columns, *shape) or x.dtype != found.dtype:
                    raise ValueError(
                        f"trace {path.stem}: {name} of layer {layer} is {x.dtype} {tuple(x.shape)}; allowed: "
                        f"{found.dtype} {(columns, *shape)}"
                    )
            layers.append(stack)
        return found, layers


def _metadata(layout: Layout, length: int) -> dict[str, str]:
    return {
        "format": FORMAT,
        "model": layout.model,
        "columns": str(length),
        "shapes": json.dumps(layout.shapes),
        "dtype": str(layout.dtype).removeprefix("torch."),
    }


def _described(metadata: dict[str, str]) -> tuple[Layout, int]:
    if metadata.get("format") != FORMAT:
        raise ValueError(f"format is {metadata.get('format')!r}; allowed: {FORMAT}")
    shapes = tuple((int(heads), int(dim)) for heads, dim in json.loads(metadata["shapes"]))
    return Layout(metadata["model"], shapes, getattr(torch, metadata["dtype"])), int(metadata["columns"])


def _digest(layout: Layout, length: int, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(_metadata(layout, length), sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
