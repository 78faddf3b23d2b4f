"""Every Triton kernel compiles for GPUs that need not be there: the compiler checks types, the interpreter does not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")


def test_kernels_compile(arch="90"):
    # In its own process: this one's kernels are the interpreter's.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("triton_resources.py")), arch, "--head-dim", "128"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    kernels = (
        "_copy",
        "_move",
        "_merge",
        "_partial_product",
        "_rescale",
        "_rescale_backward",
        "_attend",
        "_attend_backward",
        "_combine",
    )
    kernels += ("forward_kernel", "queries_kernel", "columns_kernel", "token_kernel")
    assert all(f" {kernel} " in done.stdout for kernel in kernels)
