"""Drives CMake: the compiled libraries are plain shared objects that diffmas_ops/library.py loads."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))

from diffmas_build import torch_root  # noqa: E402


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    search = os.pathsep.join([os.environ.get("PATH", ""), *(str(Path(home, "bin")) for home in homes if home)])
    return shutil.which("nvcc", path=search)


def cuda_compiler() -> str | None:
    """nvcc, where the CUDA library is to be built: DIFFMAS_CUDA=0 never, 1 always, unset wherever nvcc is found."""
    choice = os.environ.get("DIFFMAS_CUDA", "")
    if choice not in ("", "0", "1"):
        raise ValueError(f"DIFFMAS_CUDA is {choice!r}; allowed are 0, 1 or unset")
    nvcc = None if choice == "0" else find_nvcc()
    if choice == "1" and nvcc is None:
        raise RuntimeError("DIFFMAS_CUDA=1, but no nvcc is on PATH, in CUDA_HOME/bin or in /usr/local/cuda/bin")
    return nvcc


class BuildNative(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        *package, name = fullname.split(".")
        return str(Path(*package, f"libdiffmas{name}.so"))

    def build_extensions(self) -> None:
        build = Path(self.build_temp).resolve()
        output = Path(self.get_ext_fullpath(self.extensions[0].name)).resolve().parent
        nvcc, ninja = cuda_compiler(), shutil.which("ninja")
        configure = [
            "cmake", "-S", ROOT, "-B", build,
            *(["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []),
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            f"-DTORCH_ROOT={torch_root()}",
            f"-DDIFFMAS_CUDA={'ON' if nvcc else 'OFF'}",
            *([f"-DCMAKE_CUDA_COMPILER={nvcc}"] if nvcc else []),
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        jobs = [f"-j{self.parallel}"] if self.parallel else []
        subprocess.run(["cmake", "--build", build, *jobs], check=True)


class AnyPythonWheel(bdist_wheel):
    """The libraries use LibTorch's stable ABI and nothing of Python's: one wheel per platform serves every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension(f"diffmas_ops.{name}", []) for name in ["_cpu", *(["_cuda"] if cuda_compiler() else [])]],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPythonWheel},
)
