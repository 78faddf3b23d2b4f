"""The trained trace (DiffMAS, arXiv 2604.21794): exact gradients through it, or cut at every hand-over."""

from diffmas.evaluation.methods.base import ALL_CONTROLS, Method

DIFFMAS = Method("diffmas", "trained trace", trained=True, settings={"detach_trace": False}, controls=ALL_CONTROLS)
DIFFMAS_DETACHED = Method(
    "diffmas+detach", "trained, gradient cut at hand-overs", trained=True, settings={"detach_trace": True},
    controls=ALL_CONTROLS,
)  # fmt: skip
