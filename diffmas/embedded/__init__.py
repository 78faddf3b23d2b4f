"""The embedded base: a tiny Qwen3-architecture model and its tokenizer, trained by `diffmas.embedded.pretrain`."""

from pathlib import Path

#: Folder that transformers' `from_pretrained` loads.
EMBEDDED_PATH = str(Path(__file__).parent / "base")
