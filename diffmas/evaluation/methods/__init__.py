"""The methods that are compared: who takes part, through which channel they talk, and whether it was trained."""

from __future__ import annotations

from diffmas.evaluation.methods.base import Method, Reading, TraceChannel
from diffmas.evaluation.methods.diffmas import DIFFMAS, DIFFMAS_DETACHED
from diffmas.evaluation.methods.latent import LATENT
from diffmas.evaluation.methods.single import SINGLE, SINGLE_NO_THINKING, SINGLE_SFT, SINGLE_THINKING
from diffmas.evaluation.methods.stitch import STITCH, STITCH_TRAINED
from diffmas.evaluation.methods.text import TEXT, TEXT_SFT, TextChannel

__all__ = ["METHODS", "MODES", "Method", "Reading", "TextChannel", "TraceChannel", "choose_methods"]

#: Every method by name, in the order tables show them.
METHODS = {
    method.name: method
    for method in (
        SINGLE, SINGLE_SFT, TEXT, TEXT_SFT, LATENT, STITCH, STITCH_TRAINED, DIFFMAS, DIFFMAS_DETACHED,
    )
}  # fmt: skip
#: Methods of models whose chat template has a switch for thinking.
MODES = {method.name: method for method in (SINGLE_THINKING, SINGLE_NO_THINKING)}


def choose_methods(names: str) -> list[Method]:
    """Methods from names separated by commas ("all": every one of :data:`METHODS`).

    Raises:
        ValueError: an unknown name.
    """
    chosen = list(METHODS) if names == "all" else [name.strip() for name in names.split(",")]
    if unknown := [name for name in chosen if name not in METHODS | MODES]:
        raise ValueError(f"methods has {unknown}; allowed: all, or any of {', '.join(METHODS | MODES)}")
    return [(METHODS | MODES)[name] for name in dict.fromkeys(chosen)]
