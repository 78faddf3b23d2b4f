"""The compiled backends, one for each kind of device.

The compiled operators take ranges and scores flat; :class:`Functions` gives them the signatures of the others.
"""

from __future__ import annotations

import torch

from diffmas_ops import library
from diffmas_ops.dtypes import SUPPORTED
from diffmas_ops.layer import Saved, flat_backward_input, flat_backward_output, flat_forward
from diffmas_ops.need import OPERATORS, Need


class Functions:
    """The operators of a compiled library, with the signatures of the reference."""

    def __init__(self, operators):
        self._operators = operators

    def __getattr__(self, name: str):
        return getattr(self._operators, name)

    def kv_append(self, k, v, keys, values, rows):
        return self._operators.kv_append(k, v, keys, values, *rows)

    def kv_gather(self, keys, values, rows, total, dtype):
        return self._operators.kv_gather(keys, values, *rows, total, dtype)

    def cached_attention(self, q, k, v, keys, values, rows, scores):
        return self._operators.cached_attention(q, k, v, keys, values, *rows, *scores)

    def cached_attention_backward_queries(self, grad_out, q, out, lse, keys, values, rows, scores):
        return self._operators.cached_attention_backward_queries(grad_out, q, out, lse, keys, values, *rows, *scores)

    def cached_attention_backward_columns(
        self, grad_out, q, lse, delta, keys, values, grad_keys, grad_values, rows, columns, scores
    ):
        return self._operators.cached_attention_backward_columns(
            grad_out, q, lse, delta, keys, values, grad_keys, grad_values, *rows, *columns, *scores
        )

    def cached_attention_backward(
        self, grad_out, q, out, lse, keys, values, grad_keys, grad_values, rows, columns, scores
    ):
        return self._operators.cached_attention_backward(
            grad_out, q, out, lse, keys, values, grad_keys, grad_values, *rows, *columns, *scores
        )

    def cached_attention_backward_token(
        self, grad_out, q, out, lse, keys, values, grad_keys, grad_values, pending, rows, scores
    ):
        return self._operators.cached_attention_backward_token(
            grad_out, q, out, lse, keys, values, grad_keys, grad_values, *pending, *rows, *scores
        )

    def decoder_layer(self, *arguments):
        made = self._operators.decoder_layer(*flat_forward(*arguments))
        return made[0], Saved._make(made[1:])

    def decoder_layer_backward_output(self, *arguments):
        return self._operators.decoder_layer_backward_output(*flat_backward_output(*arguments))

    def decoder_layer_backward_input(self, *arguments):
        return self._operators.decoder_layer_backward_input(*flat_backward_input(*arguments))


class Compiled:
    """What the library for `device` ("cpu", "cuda") serves."""

    def __init__(self, device: str):
        self.device = device

    def refusal(self, need: Need) -> str | None:
        """Why it cannot serve, or None where it can."""
        if need.device != self.device:
            return f"it runs on {self.device} tensors only, not on {need.device}"
        if (reason := library.failure(self.device)) is not None:
            return reason
        if need.dtype not in SUPPORTED:
            return f"it has no {need.dtype} kernels"
        missing = [f for f in OPERATORS[need.operator] if not library.has_kernel(f, self.device)]
        return f"no {self.device} kernel is registered for {', '.join(missing)}" if missing else None

    def functions(self, operator: str) -> Functions:
        return _FUNCTIONS


_FUNCTIONS = Functions(torch.ops.diffmas)
CPU, CUDA = Compiled("cpu"), Compiled("cuda")
