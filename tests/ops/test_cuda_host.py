"""The CUDA kernels and launchers, compiled for the CPU by `tests/cuda_host` and tested like the CUDA library.

Covered: the launchers (choice of kernel, grids, splits, shared-memory sizes within what compute capability 8.0 grants),
index arithmetic, masks, tiling, pipelining depth, split and merge, deferred rows, and the exact lane-by-lane layout
of `mma`, `ldmatrix` and shuffle operands as the PTX manual documents them. Threads and blocks run in permuted
orders, asynchronous copies land only when waited for, and shared memory starts as NaN, so that a missing barrier or
wait is likely to show.

Not covered: that the GPU's instructions do what the manual says, true concurrency (races inside a warp between
two barriers, memory ordering, blocks at once), the PTX wrappers in `device.cuh`, the approximation of `ex2`, fusing
of multiplications and additions, register pressure, streams, graphs, devices, and every question of speed.
"""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cases
import pytest
import test_triton as suite
import torch
from cases import Case
from test_cuda import (  # noqa: F401
    VOCABULARIES,
    everything,
    sized,
    test_append_and_gather,
    test_attention,
    test_attention_in_float64,
    test_concat,
    test_concat_of_many_senders,
    test_concat_of_overlapping_segments,
    test_deferred_rows,
    test_expected_embedding_of_other_gradients,
    test_expected_embedding_without_some_tokens,
    test_groups_of_heads,
    test_head_dim_too_large,
    test_head_dims,
    test_latent_project,
    test_latent_project_in_parts,
    test_merge_states,
    test_nothing_out_of_sight_is_read,
    test_other_scores,
    test_other_scores_at_other_sizes,
    test_senders_of_two_dtypes,
    test_token_backward,
    test_token_backward_of_other_scores,
    use,
)

from diffmas_ops.dtypes import SUPPORTED

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
ROOT = Path(__file__).resolve().parents[2]
TORCH = Path(torch.__file__).parent


@pytest.fixture(scope="session")
def host_library(tmp_path_factory):
    """The launchers and kernels under a namespace of their own; the schemas and registrations are the CPU library's."""
    build = tmp_path_factory.mktemp("cuda_host")
    sources = [ROOT / "csrc/bindings.cpp", *sorted((ROOT / "csrc/cuda").glob("*.cu"))]
    flags = [
        "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-U_FORTIFY_SOURCE",
        "-Wall", "-Wno-unknown-pragmas", "-Werror", "-Ddiffmas=diffmas_cuda_host",
        "-DTORCH_TARGET_VERSION=0x020B000000000000", "-isystem", TORCH / "include", "-I", ROOT / "tests/cuda_host",
        "-I", ROOT / "csrc", "-I", ROOT / "csrc/include",
    ]  # fmt: skip

    def compile(source):
        target = build / f"{source.name}.o"
        subprocess.run(["g++", *flags, "-x", "c++", "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile, sources))
    subprocess.run(
        ["g++", "-shared", "-o", build / "library.so", *objects, f"-L{TORCH / 'lib'}", "-ltorch_cpu"], check=True
    )
    torch.ops.load_library(build / "library.so")
    return torch.ops.diffmas_cuda_host


@pytest.fixture(autouse=True)
def operators(host_library, monkeypatch):
    for module in (cases, suite):
        monkeypatch.setattr(module, "DEVICE", "cpu")
    # Few enough that small problems are unsplit as well as split.
    monkeypatch.setenv("DIFFMAS_HOST_MULTIPROCESSORS", "12")
    return use(monkeypatch, host_library)


#: Every size in two of the types, once with a bias and a cap: the emulation is slow.
VOCABULARY_CASES = [
    (*sizes, biased, softcap, SUPPORTED[(i + shift) % len(SUPPORTED)])
    for i, sizes in enumerate(VOCABULARIES.values())
    for shift, (biased, softcap) in enumerate([(False, None), (True, 2.5)])
]


@pytest.mark.parametrize("rows, vocab, depth, width, biased, softcap, dtype", VOCABULARY_CASES)
def test_expected_embedding(rows, vocab, depth, width, biased, softcap, dtype):
    suite.check_expected_embedding(rows, vocab, depth, width, biased, softcap, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("new", [1, 5])
def test_devices_of_little_shared_memory(monkeypatch, new, head_dim, dtype):
    """What compute capability 8.6 and 8.9 grant is enough, if need be for the simple kernels."""
    monkeypatch.setenv("DIFFMAS_HOST_SHARED_LIMIT", str(99 * 1024))
    case = sized(Case((new,), (140,)), head_dim, "more than a tile")
    suite.check_forward(case, dtype)
    suite.check_backward(case, dtype)
    suite.check_expected_embedding(new, 140, head_dim, head_dim, False, None, dtype)


def test_latent_project_in_two_launches(monkeypatch):
    """Where no counters are left, a second kernel finishes the rows."""
    monkeypatch.setenv("DIFFMAS_HOST_NO_SLOTS", "1")
    suite.test_latent_project(5, 584, True, torch.bfloat16)


@pytest.mark.parametrize("seed", range(2))
def test_whichever_block_comes_last(operators, monkeypatch, seed):
    """The same bits for every order of the blocks of a projection."""
    torch.manual_seed(0)
    hidden, weight = cases.random(5, 584, dtype=torch.float16), cases.random(584, 584, dtype=torch.float16)
    results = []
    for at in (0, seed + 1):
        monkeypatch.setenv("DIFFMAS_HOST_SEED", str(at))
        out, norm = operators.latent_project(hidden, weight, 1.7)
        grads = operators.latent_project_backward(hidden, hidden, weight, out, norm, 1.7, True)
        results.append((out, norm, *grads))
    assert all(map(suite.same, *results))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_order_of_threads_and_blocks(operators, monkeypatch, dtype):
    """The same bits whatever the order in which threads and blocks take their turns."""
    results = []
    for seed in range(3):
        monkeypatch.setenv("DIFFMAS_HOST_SEED", str(seed))
        results.append(everything(operators, dtype))
    for other in results[1:]:
        assert all(map(suite.same, other, results[0]))
