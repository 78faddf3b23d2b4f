"""Tile shapes of the Triton attention kernels, written down per GPU: nothing is tuned on a user's first step.

Chosen by counting registers and shared memory (sm_90 and newer data-centre parts 227 KB a block, sm_80 163 KB, the
other parts 99 KB), starting from the shapes that work for FlexAttention on the same GPUs; not measured here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from diffmas_ops.triton_device import architecture, multiprocessors


class Tile(NamedTuple):
    """`block_m` query rows (tokens times heads of a group) against `block_n` trace columns."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# Kernel -> head dim -> tile. "forward" and "queries" (dQ) walk over columns for a block of queries, "columns"
# (dK, dV) over queries for a block of columns. "few" serves forward and dQ when a row has at most _FEW query rows:
# reading the trace is all they do, so small tiles with deep pipelines.
_FEW = 64
_TILES = {
    "sm_90": {
        "forward": {64: Tile(128, 128, 8, 3), 128: Tile(128, 128, 8, 2), 256: Tile(128, 64, 8, 2)},
        "queries": {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 3), 256: Tile(64, 32, 8, 2)},
        "columns": {64: Tile(64, 128, 8, 3), 128: Tile(64, 128, 8, 2), 256: Tile(32, 64, 8, 2)},
        "few": {64: Tile(_FEW, 64, 4, 4), 128: Tile(_FEW, 64, 4, 3), 256: Tile(_FEW, 32, 4, 3)},
    },
    "sm_80": {
        "forward": {64: Tile(128, 64, 4, 3), 128: Tile(128, 64, 8, 3), 256: Tile(64, 32, 4, 2)},
        "queries": {64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 4, 2), 256: Tile(64, 32, 8, 2)},
        "columns": {64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 4, 2), 256: Tile(32, 32, 8, 1)},
        "few": {64: Tile(_FEW, 64, 4, 4), 128: Tile(_FEW, 64, 4, 3), 256: Tile(_FEW, 32, 4, 2)},
    },
    "other": {
        "forward": {64: Tile(128, 64, 4, 2), 128: Tile(64, 64, 4, 2), 256: Tile(64, 16, 4, 2)},
        "queries": {64: Tile(64, 64, 4, 2), 128: Tile(64, 32, 4, 2), 256: Tile(32, 16, 4, 2)},
        "columns": {64: Tile(64, 64, 4, 2), 128: Tile(32, 64, 4, 2), 256: Tile(16, 32, 4, 1)},
        "few": {64: Tile(_FEW, 64, 4, 3), 128: Tile(_FEW, 32, 4, 3), 256: Tile(32, 16, 4, 2)},
    },
    # Exact products run on the ordinary pipes out of registers, where large tiles spill.
    "float32": {
        "forward": {64: Tile(64, 32, 8, 1), 128: Tile(32, 32, 8, 1), 256: Tile(16, 16, 4, 1)},
        "queries": {64: Tile(32, 32, 8, 1), 128: Tile(16, 16, 4, 1), 256: Tile(16, 16, 4, 1)},
        "columns": {64: Tile(32, 32, 8, 1), 128: Tile(16, 16, 4, 1), 256: Tile(16, 16, 4, 1)},
        "few": {64: Tile(32, 32, 4, 1), 128: Tile(16, 16, 4, 1), 256: Tile(16, 16, 4, 1)},
    },
    # Small and unequal, so that small test shapes cross many tile borders.
    "interpreter": {
        "forward": {256: Tile(32, 16, 4, 1)},
        "queries": {256: Tile(32, 16, 4, 1)},
        "columns": {256: Tile(16, 32, 4, 1)},
        "few": {256: Tile(16, 16, 4, 1)},
    },
}
_FAMILY = {0: "interpreter", 80: "sm_80", 90: "sm_90", 100: "sm_90", 103: "sm_90"}


def tile(kernel: str, like: torch.Tensor, rows: int) -> Tile:
    """Tile of `kernel` ("forward", "queries", "columns") for `like [..., head_dim]` and up to `rows` query rows."""
    family = _FAMILY.get(architecture(like.device), "other")
    if family != "interpreter" and like.dtype == torch.float32:
        family = "float32"
    few = rows <= _FEW and kernel != "columns"
    shapes = _TILES[family]["few" if few else kernel]
    head_dim = like.shape[-1]
    if head_dim > max(shapes):
        raise ValueError(f"head_dim is {head_dim}; allowed: at most {max(shapes)}")
    chosen = next(shape for limit, shape in sorted(shapes.items()) if head_dim <= limit)
    smallest = 16  # the fewest rows a matrix instruction takes
    while chosen.block_m > smallest and chosen.block_m >= 2 * rows:
        chosen = chosen._replace(block_m=chosen.block_m // 2)
    return chosen


def split(programs: int, max_seqlen_k: int, block_n: int, device: torch.device) -> tuple[int, int]:
    """`(parts, columns per part)`: cut long traces up where `programs` blocks of queries would not fill the GPU."""
    wanted = max(1, 2 * multiprocessors(device) // max(programs, 1))
    blocks = -(-max_seqlen_k // block_n)
    chunk = max(4, -(-blocks // wanted)) * block_n
    return max(1, -(-max_seqlen_k // chunk)), chunk
