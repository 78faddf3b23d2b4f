"""Kernels and autograd for attention through key/value traces shared between language-model agents."""

import diffmas_ops.threads  # noqa: F401  (before anything that imports torch)

# isort: split
from diffmas_ops.cached_attention.api import cached_attention
from diffmas_ops.call import Call
from diffmas_ops.errors import CapacityError, UnsupportedError
from diffmas_ops.expected_embedding.api import expected_embedding
from diffmas_ops.few_rows_matmul.api import few_rows_matmul
from diffmas_ops.kv_concat.api import Rotary, Segment, kv_concat
from diffmas_ops.latent_project.api import latent_project
from diffmas_ops.merge_states.api import merge_states
from diffmas_ops.trace import KVTrace

__all__ = [
    "Call",
    "CapacityError",
    "KVTrace",
    "Rotary",
    "Segment",
    "UnsupportedError",
    "cached_attention",
    "expected_embedding",
    "few_rows_matmul",
    "kv_concat",
    "latent_project",
    "merge_states",
]
