"""What puts the calls of a trace in order for autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Order:
    """The order of a trace's calls, known to the trace and, weakly, to its calls.

    Attributes:
        token: empty tensor that every call consumes and replaces, so that autograd differentiates them last to first.
        differentiable: columns a row up to the last one of a call that recorded gradients, host integers.
    """

    def __init__(self, batch: int, device: torch.device):
        self.differentiable: Sequence[int] = [0] * batch
        self._device = device
        self.cut()

    def cut(self) -> None:
        """Begin anew: what comes now waits for nothing that came before."""
        self.token = torch.zeros(0, device=self._device)

    def advance(self, token: Tensor, recorded: Sequence[int] | None) -> None:
        """What comes now waits for `token`; `recorded`: the rows' columns then, where gradients were recorded."""
        self.token = token
        if recorded is not None:
            self.differentiable = recorded
