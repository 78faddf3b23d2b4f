"""Code of ours in the place of a module's own, so that the module can still be copied, pickled and saved whole."""

from __future__ import annotations

import contextlib
import copyreg
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn


class _InFront(type):
    """Of classes made by :func:`put_in_front`."""


@functools.cache
def put_in_front(front: type, kind: type) -> type:
    """`kind` with `front` before it; as it is where that is so already.

    A subclass and no patched method, since transformers wraps a layer class's `forward` for checkpointing. It bears the
    original's name, by which layers are chosen to be sharded.
    """
    return kind if issubclass(kind, front) else _InFront(kind.__name__, (front, kind), {})


def _pickled(kind: _InFront) -> tuple[Callable[..., Any], tuple[type, ...]]:
    # No module has it by its name: it is made again.
    return put_in_front, kind.__bases__


copyreg.pickle(_InFront, _pickled)


def own_kind(module: nn.Module) -> type:
    """The module's class without what torch (FSDP) and :func:`put_in_front` put before it."""
    return next((k for k in type(module).__mro__ if not k.__module__.startswith(("torch.", "diffmas."))), object)


def is_from(kind: type, origin: str) -> bool:
    """Whether the class and the forward it has now are of the module or package `origin`."""
    forward = getattr(kind, "forward", None)
    return kind.__module__.startswith(origin) and getattr(forward, "__module__", "").startswith(origin)


def replaced_by_others(module: nn.Module) -> bool:
    """Whether the module's forward was replaced, and not by :func:`replace_forward`."""
    return (forward := vars(module).get("forward")) is not None and not _is_ours(forward)


def _is_ours(forward: Any) -> bool:
    return isinstance(forward, functools.partial) and forward.func.__module__.startswith("diffmas.")


def own_class(module: nn.Module) -> type:
    """The module's class without what :func:`put_in_front`, or sharding, put before it."""
    return next(c for c in type(module).__mro__ if not c.__module__.startswith(("diffmas.", "torch.distributed.")))


@contextlib.contextmanager
def own_forwards(model: nn.Module) -> Iterator[None]:
    """With the forwards of its modules that :func:`replace_forward` replaced."""
    found = [(module, f) for module in model.modules() if _is_ours(f := vars(module).get("forward"))]
    for module, _ in found:
        del module.forward
    try:
        yield
    finally:
        for module, forward in found:
            module.forward = forward


def replace_forward(module: nn.Module, function: Callable[..., Any], **options: Any) -> None:
    """Run `function(module, …)` as the module's forward, for good; pickling finds `function` by its name."""
    # A bound method would be pickled as an attribute of `module`, which it is none of.
    module.forward = functools.partial(function, module, **options)
