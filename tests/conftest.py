"""Shared fixtures: implementations to test, poisoned buffers, a hypothesis profile that repeats itself."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    # Without a GPU, Triton's kernels run through its interpreter; that has to be said before Triton is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("repeatable", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
settings.load_profile("repeatable")


@pytest.fixture(params=["reference", "auto"])
def implementation(request):
    return request.param


@pytest.fixture
def poison():
    """Every buffer allocated without a value starts as NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all(), "torch.utils.deterministic.fill_uninitialized_memory is off"
    yield
    torch.use_deterministic_algorithms(before)
