"""`pytest benchmarks/ --benchmark-only`: one test a case, and a table of all of them at the end."""

import gc

import pytest
import torch

from benchmarks import ceilings, curves, report
from benchmarks.experiment import measure
from benchmarks.timing import Clock

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_RESULTS = pytest.StashKey()


def pytest_configure(config):
    config.stash[_RESULTS] = []
    config.stash[curves.STASH] = {}


@pytest.fixture(scope="session")
def clock():
    return Clock(DEVICE)


@pytest.fixture
def compare(benchmark, clock, request):
    """Check and race an experiment; pytest-benchmark keeps the times of ours. Returns the record."""

    def run(experiment, seconds):
        result = measure(experiment, seconds=seconds, clock=clock, pedantic=benchmark.pedantic)
        request.config.stash[_RESULTS].append(result)
        benchmark.extra_info.update(speedup=report.speedup(result), errors=result["allowed_error"])
        return result

    yield run
    gc.collect()


def pytest_terminal_summary(terminalreporter, config):
    if results := config.stash[_RESULTS]:
        terminalreporter.section("against peers, correctness checked first")
        dtypes = sorted({r["case"]["dtype"] for r in results})
        report.print_results(results, ceilings.measure(DEVICE, dtypes))
    curves.print_curves(config.stash[curves.STASH])
