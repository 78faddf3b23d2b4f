"""Our implementations of an operator beside its peers: what every operator's experiments have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.experiment import Contender, Experiment
from diffmas_ops import backends
from diffmas_ops.need import Need

#: Scores that `reference` may hold at once; above, it is not run.
_REFERENCE_BYTES = 8 << 30


def implementations(operator: str, device: str, dtype: str) -> dict[str, Any]:
    """Every backend of `operator` by name: its functions, or why it cannot run."""
    found = {}
    for name in backends.BACKENDS:
        if name in ("cpu", "cuda") and name != device:
            continue
        reason = backends.refusal(name, Need(operator, device, getattr(torch, dtype)))
        like = torch.empty(0, dtype=getattr(torch, dtype), device=device)
        found[name] = reason or backends.functions(operator, like, name)
    return found


def experiment(
    operator: str,
    direction: str,
    case: Case,
    device: str,
    make: Callable[[Any, str], Contender],
    others: dict[str, Contender | str],
    exact: Callable[[], tuple[Tensor, ...]],
    outputs: tuple[str, ...],
    *,
    kernels: str = "",
    reference_bytes: float = 0,
) -> Experiment:
    """Our implementations and `others`, plain PyTorch first among them.

    Args:
        make: turns a backend, `(its functions, its name)`, into a contender.
        kernels: the operator that is asked for its implementations, where `operator` is only a title.
        reference_bytes: of the scores that `reference` would hold.
    """
    found = implementations(kernels or operator, device, case.dtype)
    if reference_bytes > _REFERENCE_BYTES and len(found) > 1:
        found["reference"] = f"would hold {reference_bytes / 1e9:.0f} GB of scores"
    ours = {n: f if isinstance(f, str) else make(f, n) for n, f in found.items()}
    able = tuple(n for n, c in ours.items() if not isinstance(c, str))
    return Experiment(
        operator=operator,
        direction=direction,
        case=case,
        work=getattr(case, direction.replace(" ", "_"))(),
        contenders=ours | others,
        ours=backends.resolve("auto", Need(kernels or operator, device, getattr(torch, case.dtype))),
        implementations=tuple(n for n in able if n != "reference"),
        plain=tuple(others),
        exact=exact,
        factor=2.0 if direction == "forward" else 3.0,
        device=device,
        outputs=outputs,
    )


def normal(*shape: int, like: Case, device: str, dtype: torch.dtype | None = None) -> Tensor:
    return torch.randn(*shape, device=device, dtype=dtype or getattr(torch, like.dtype))


def int32(values, device: str) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def gradients(state: tuple) -> tuple[Tensor, ...]:
    """Of `(outputs, inputs, output gradients)`: what a peer's backward is."""
    return torch.autograd.grad(*state)
