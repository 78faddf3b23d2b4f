"""The embedded bases: tiny models and their tokenizers, trained by `diffmas.embedded.pretrain`.

Two of different architecture, width, depth and vocabulary, so that agents of different models can be tried on a laptop.
"""

from pathlib import Path

_HERE = Path(__file__).parent
#: Folder that transformers' `from_pretrained` loads: what there is where no model is named.
EMBEDDED_PATH = str(_HERE / "base")
#: All of them, by what they are called where a model is named.
EMBEDDED = {"embedded": EMBEDDED_PATH, "embedded-llama": str(_HERE / "llama")}


def embedded_path(name: str | None) -> str | None:
    """The folder of an embedded base; None where `name` is no name of one. A folder of its name comes first."""
    if name is None:
        return EMBEDDED_PATH
    return None if Path(name).is_dir() else EMBEDDED.get(name)
