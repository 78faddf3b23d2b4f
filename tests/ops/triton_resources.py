"""Compile the Triton kernels for a GPU that need not be there: `python tests/ops/triton_resources.py [ARCH ...]`.

Prints registers, stack (spills) and shared memory of every kernel as the operators would launch it in bfloat16 for
32 query and 8 key/value heads, 1024 tokens and single ones, over 2048 columns. ARCH: 80, 86, 90 (default), 100.
Unlike the interpreter, the compiler checks types. Fails where a kernel needs more shared memory than the GPU has.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

# Run by its path, it does not find a package that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from diffmas_ops import triton_device
from diffmas_ops.cached_attention import tiles
from diffmas_ops.cached_attention import triton as attention
from diffmas_ops.expected_embedding import triton as expected
from diffmas_ops.kv_append import triton as append
from diffmas_ops.kv_concat import triton as concat
from diffmas_ops.latent_project import triton as latent
from diffmas_ops.rows import ColumnRanges, Pending, RowRanges
from diffmas_ops.scores import Scores

#: Bytes of shared memory a block can have.
SHARED = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class AbsentGpu:
    """The active driver, as far as compiling asks for one."""

    def __init__(self, arch: int):
        self.get_current_target = lambda: GPUTarget("cuda", arch, 32)
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device=None: 0
        self.get_active_torch_device = lambda: torch.device("cpu")


def pretend(arch: int, report) -> None:
    """Compile instead of launching, for `arch`."""
    driver.set_active(AbsentGpu(arch))
    for module in (triton_device, tiles, latent, expected):
        for name, value in (("architecture", arch), ("multiprocessors", 132)):
            if hasattr(module, name):
                setattr(module, name, lambda device, value=value: value)
    JITFunction.__getitem__ = lambda self, grid: (
        lambda *args, **options: report(self.fn.__name__, self.warmup(*args, grid=grid, **options))
    )


def registers_and_stack(cubin: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return tuple(int(re.search(rf"{field}:(\d+)", usage).group(1)) for field in ("REG", "STACK"))


def launch_everything(head_dim: int, dtype: torch.dtype) -> None:
    """Every kernel, on tensors whose contents do not matter."""
    keys, gradients = torch.empty(1, 8, 4096, head_dim, dtype=dtype), torch.empty(1, 8, 4096, head_dim)
    column = torch.zeros(1, dtype=torch.int32)
    for tokens, scores in itertools.product((1024, 1), (Scores(0.1), Scores(0.1, 256, 30.0, 512))):
        q, k = (torch.empty(tokens, heads, head_dim, dtype=dtype) for heads in (32, 8))
        lse, rows = torch.empty(tokens, 32), RowRanges(column, column, column, tokens, 2048 + tokens)
        attention.cached_attention(q, k, k, keys, keys, rows, scores)
        inputs = (q, q, q, lse, keys, keys)
        if tokens == 1:
            pending = [torch.empty(1, 32, 32, head_dim, dtype=dtype)] * 2 + [torch.empty(1, 32, 32)] * 2
            pending = Pending(*pending, column)
            attention.cached_attention_backward_token(*inputs, gradients, gradients, pending, rows, scores)
        else:
            attention.cached_attention_backward_queries(*inputs, rows, scores)
            attention.cached_attention_backward_columns(
                q, q, lse, lse, keys, keys, gradients, gradients, rows, ColumnRanges(column, column), scores
            )
    append.kv_gather(gradients, gradients, RowRanges(column, column, column, 1024, 1024), 1024, dtype)
    plan, angle = [column.unsqueeze(0)] * 3, torch.empty(1, 1, head_dim // 2)
    concat.kv_concat([keys[None]], [keys[None]], keys[None], keys[None], *plan, angle, angle, False)
    grads = gradients[None]
    concat.kv_concat_backward(grads, grads, [grads], [grads], *plan, angle, angle, False)
    hidden, weight = torch.empty(16, 2560, dtype=dtype), torch.empty(2560, 2560, dtype=dtype)
    out, norm = latent.latent_project(hidden, weight, 1.0)
    latent.latent_project_backward(hidden, hidden, weight, out, norm, 1.0, True)
    vocabulary, warm = torch.empty(50000, 2560, dtype=dtype), torch.ones(1)
    for bias, softcap in ((None, None), (torch.empty(50000, dtype=dtype), 30.0)):
        given = (hidden, vocabulary, vocabulary, bias, warm)
        out, lse = expected.expected_embedding(*given, 1.0, softcap)
        expected.expected_embedding_backward(hidden, *given, out, lse, 1.0, softcap)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arch", nargs="*", type=int)
    parser.add_argument("--head-dim", nargs="*", type=int, default=[64, 128, 256])
    options = parser.parse_args()
    print(f"triton {triton.__version__}\n{'sm':>3} {'dim':>4} {'kernel':18} registers stack shared warps")
    for arch in options.arch or [90]:
        for head_dim in options.head_dim:

            def report(name, compiled, arch=arch, head_dim=head_dim):
                registers, stack = registers_and_stack(compiled.asm["cubin"])
                shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
                print(f"{arch:3} {head_dim:4} {name:18} {registers:9} {stack:5} {shared:6} {warps:5}", flush=True)
                if shared > SHARED[arch]:
                    raise SystemExit(f"{name} needs {shared} bytes of shared memory; sm_{arch} has {SHARED[arch]}")

            pretend(arch, report)
            launch_everything(head_dim, torch.bfloat16)


if __name__ == "__main__":
    main()
