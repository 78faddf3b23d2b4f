"""`python -m diffmas_ops.doctor`: what was built, what is loaded, and which backend runs each operator."""

from __future__ import annotations

import platform
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from diffmas_ops import backends, library, threads
from diffmas_ops.need import OPERATORS, Need

_THREADS = {
    "own": "threads of their own (DIFFMAS_THREADS=openmp for OpenMP's)",
    "openmp": "OpenMP's threads, which slow a busy machine down: import diffmas before torch",
}


def main() -> None:
    """Print the libraries, then per device, dtype and operator the choice of `auto` and why others are off."""
    console = Console()
    console.print(f"torch {torch.__version__}, Python {platform.python_version()}, {torch.get_num_threads()} threads")
    console.print(f"compiled operators run on {_THREADS[threads.CHOSEN]}")
    libraries = Table("library", "built", "loaded", title="Compiled libraries", title_justify="left")
    for name in ("cpu", "cuda"):
        built = Path(library.__file__).with_name(f"libdiffmas_{name}.so").is_file()
        libraries.add_row(name, "yes" if built else "no", library.failure(name) or "yes")
    console.print(libraries)

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        where = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        table = Table("operator", "auto", "others", title=f"Operators on {where}, {dtype}", title_justify="left")
        for operator, many in [*((o, False) for o in OPERATORS), ("cached_attention", True)]:
            need = Need(operator, device, dtype, many)
            chosen = backends.resolve("auto", need)
            others = []
            for name in backends.BACKENDS:
                if name != chosen and (many or name != "flash"):
                    others.append(f"{name}: {backends.refusal(name, need) or 'available'}")
            kind = {"cached_attention": " (several tokens)" if many else " (one token a row)"}.get(operator, "")
            table.add_row(operator + kind, chosen, "\n".join(others))
        console.print(table)


if __name__ == "__main__":
    main()
