"""The backend in plain PyTorch: the specification, which serves whatever is asked of it."""

import importlib
from types import ModuleType

from diffmas_ops.need import Need


def refusal(need: Need) -> None:
    """Nothing is refused."""


def functions(operator: str) -> ModuleType:
    return importlib.import_module(f"diffmas_ops.{operator}.reference")
