"""What the CUDA kernels occupy, by nvcc's own report: `python -m benchmarks.kernel_resources [--arch 80 90] [--all]`.

Needs nvcc and no GPU. Prints registers, shared memory, stack and spills of the kernels and how many blocks of each
fit a multiprocessor. Fails where a hot kernel spills registers or has a stack frame; hot is everything but float64
and the `simple` kernels, which serve the types and head dims that the others do not.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
FLAGS = [
    "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020B000000000000",
    "-isystem", f"{torch.__path__[0]}/include", f"-I{ROOT}/csrc", f"-I{ROOT}/csrc/include",
]  # fmt: skip
#: Bytes of shared memory and registers of a multiprocessor; a block takes 1 KB more than it asks for.
SHARED = {"80": 164 * 1024, "90": 228 * 1024}
REGISTERS = 64 * 1024
#: Kernels whose dynamic shared memory is a struct of the same leading template parameters, and the struct's header.
SHARED_STRUCTS = {
    "attention_forward_kernel": ("ForwardShared", 3, "attention_forward"),
    "attention_backward_queries_kernel": ("QueriesShared", 3, "attention_backward_queries"),
    "attention_backward_columns_kernel": ("ColumnsShared", 2, "attention_backward_columns"),
    "product_kernel": ("ProductShared", 2, "project"),
    "vocabulary_kernel": ("VocabularyShared", 2, "expected_embedding"),
}
THREADS = {"vocabulary": 256, **dict.fromkeys(SHARED_STRUCTS, 128), "simple": 128, "merge": 128, "rescale": 1024}

_ENTRY = re.compile(
    r"Compiling entry function '(?P<symbol>\S+)'.*?(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.S,
)


@dataclass
class Kernel:
    name: str
    registers: int
    stack: int
    spills: int
    static_shared: int
    dynamic_shared: int | None = None

    @property
    def hot(self) -> bool:
        return "_simple_" not in self.name and "<double" not in self.name

    @property
    def threads(self) -> int:
        return next((n for part, n in THREADS.items() if part in self.name), 256)

    def blocks(self, arch: str) -> int:
        registers = -(-self.registers // 8) * 8 * self.threads
        shared = self.static_shared + (self.dynamic_shared or 0) + 1024
        return min(REGISTERS // registers, SHARED[arch] // shared, 2048 // self.threads)


def find_nvcc() -> str:
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    path = os.pathsep.join([os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes)])
    if (nvcc := shutil.which("nvcc", path=path)) is None:
        sys.exit("nvcc was not found on PATH, in CUDA_HOME/bin or in /usr/local/cuda/bin")
    return nvcc


def compile_kernels(nvcc: str, source: Path, arch: str, directory: Path) -> list[Kernel]:
    target = directory / f"{source.stem}_{arch}.cubin"
    code = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    command = [nvcc, *FLAGS, code, "-Xptxas", "-v", "-cubin", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    entries = list(_ENTRY.finditer(done.stderr))
    symbols = "\n".join(entry["symbol"] for entry in entries)
    names = subprocess.run(["c++filt"], input=symbols, capture_output=True, text=True, check=True)
    kernels = []
    for entry, name in zip(entries, names.stdout.splitlines(), strict=True):
        name = re.sub(r"^void |diffmas::|\(.*$", "", name)
        static = re.search(r"(\d+) bytes smem", entry["rest"])
        spills = int(entry["stores"]) + int(entry["loads"])
        kernels.append(
            Kernel(name, int(entry["registers"]), int(entry["stack"]), spills, int(static[1]) if static else 0)
        )
    return kernels


def add_dynamic_shared(nvcc: str, kernels: list[Kernel], directory: Path) -> None:
    """Sizes of the shared-memory structs, printed by a program that nvcc compiles for the host."""
    lines, listed = [], []
    for kernel in kernels:
        base, _, parameters = kernel.name.rstrip(">").partition("<")
        if base in SHARED_STRUCTS:
            struct, count, _ = SHARED_STRUCTS[base]
            arguments = ", ".join(p.strip() for p in parameters.split(",")[:count])
            lines.append(f'  std::printf("%zu\\n", sizeof(diffmas::{struct}<{arguments}>));')
            listed.append(kernel)
    headers = [f'#include "diffmas/{header}.cuh"' for _, _, header in SHARED_STRUCTS.values()]
    program = directory / "sizes.cu"
    program.write_text("\n".join([*headers, "#include <cstdio>", "int main() {", *lines, "}"]))
    subprocess.run([nvcc, *FLAGS, str(program), "-o", str(directory / "sizes")], check=True)
    sizes = subprocess.run([directory / "sizes"], capture_output=True, text=True, check=True).stdout.split()
    for kernel, size in zip(listed, sizes, strict=True):
        kernel.dynamic_shared = int(size)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_resources", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", default=["80", "90"], choices=sorted(SHARED), help="architectures")
    parser.add_argument("--all", action="store_true", help="list the other kernels too")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilations at once")
    arguments = parser.parse_args()
    nvcc, failed = find_nvcc(), False
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    for arch in arguments.arch:
        with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(arguments.jobs) as pool:
            directory = Path(name)
            lists = pool.map(lambda source: compile_kernels(nvcc, source, arch, directory), sources)  # noqa: B023
            kernels = list({kernel.name: kernel for kernels in lists for kernel in kernels}.values())
            add_dynamic_shared(nvcc, kernels, directory)
        print(f"\nsm_{arch}\n{'registers':>9} {'shared':>8} {'stack':>6} {'spills':>6} {'blocks/SM':>9}  kernel")
        for k in sorted(kernels, key=lambda k: k.name):
            bad = k.hot and (k.spills or k.stack)
            failed |= bool(bad)
            if k.hot or arguments.all or bad:
                shared = k.static_shared + (k.dynamic_shared or 0)
                note = "  <- spills" if bad else ""
                print(f"{k.registers:>9} {shared:>8} {k.stack:>6} {k.spills:>6} {k.blocks(arch):>9}  {k.name}{note}")
    if failed:
        sys.exit("a hot kernel spills registers or has a stack frame")


if __name__ == "__main__":
    main()
