"""Relative errors, so that no tolerance hides behind a small or a large number."""

import math

import torch


def error(actual: torch.Tensor, expected: torch.Tensor, floor: float = 0.0) -> float:
    """`‖actual - expected‖ / max(‖expected‖, floor)` in float64; infinite where something is not finite."""
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape
    if not (actual.isfinite().all() and expected.isfinite().all()):
        return float("inf")
    difference = float((actual - expected).norm())
    return difference / max(float(expected.norm()), floor) if difference else 0.0


def gradients(module) -> dict[str, torch.Tensor]:
    """Gradient of every parameter that got one."""
    return {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """Every gradient agrees on its own scale, and none is missing; one that only one side has must be zero.

    A gradient that vanishes (a softmax over one key has none) is rounding on both sides: it is measured on a
    scale of 1e-5 of the whole gradient.
    """
    floor = 1e-5 * math.sqrt(sum(float(g.double().norm()) ** 2 for g in expected.values()))
    for name in actual.keys() | expected.keys():
        left, right = actual.get(name), expected.get(name)
        left = torch.zeros_like(right) if left is None else left
        right = torch.zeros_like(left) if right is None else right
        assert (e := error(left, right, floor)) <= tolerance, f"{name}: relative error {e:.2e} > {tolerance}"
