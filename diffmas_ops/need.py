"""What an operator is asked for, as backends are told that say whether they can serve."""

from __future__ import annotations

from typing import NamedTuple

import torch

#: Functions of each operator, by the folder that holds them.
OPERATORS = {
    "kv_append": ("kv_append", "kv_gather"),
    "kv_concat": ("kv_concat", "kv_concat_backward"),
    "latent_project": ("latent_project", "latent_project_backward"),
    "expected_embedding": ("expected_embedding", "expected_embedding_backward"),
    "few_rows_matmul": ("few_rows_matmul",),
    "decoder_layer": ("decoder_layer", "decoder_layer_backward_output", "decoder_layer_backward_input"),
    "cached_attention": (
        "cached_attention",
        "cached_attention_backward_queries",
        "cached_attention_backward_columns",
        "cached_attention_backward",
        "cached_attention_backward_token",
    ),
    "merge_states": ("merge_states",),
}


class Need(NamedTuple):
    """One of `OPERATORS`, on `device` ("cpu", "cuda"), in `dtype`.

    `many`: for a multi-token call of `cached_attention`, or its deferred rows together; `asked`: what its scores are
    beside scaled (`Scores.asked`).
    """

    operator: str
    device: str
    dtype: torch.dtype
    many: bool = False
    asked: tuple[str, ...] = ()
