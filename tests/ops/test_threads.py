"""The threads of the compiled operators: results do not depend on them, nobody waits for a thread that cannot run."""

import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from diffmas_ops import few_rows_matmul, library, threads

needs_library = pytest.mark.skipif(library.failure("cpu") is not None, reason="the CPU library was not built")


@pytest.fixture
def own():
    """The operators on threads of their own, as many as a test asks torch for."""
    before = torch.get_num_threads()
    torch.ops.diffmas.use_own_threads(True)
    yield
    torch.set_num_threads(before)
    torch.ops.diffmas.use_own_threads(threads.CHOSEN == "own")


def operands(seed=0, rows=4, size=700, out=900):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, size, generator=generator), torch.randn(size, out, generator=generator)


def product(seed=0):
    return few_rows_matmul(*operands(seed), False)


@needs_library
def test_results_do_not_depend_on_the_number_of_threads(own):
    results = []
    for count in (1, 2, 3, 5, 2):
        torch.set_num_threads(count)
        results.append(product())
    x, weight = operands()
    torch.testing.assert_close(results[0].double(), x.double() @ weight.double(), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(result, results[0]) for result in results)


@needs_library
def test_openmp_gives_the_same(own):
    torch.set_num_threads(3)
    actual = product()
    torch.ops.diffmas.use_own_threads(False)
    assert torch.equal(actual, product())


@needs_library
def test_callers_in_several_threads_at_once(own):
    torch.set_num_threads(3)
    expected = [product(seed) for seed in range(4)]
    wrong = []

    def call(seed):
        wrong.extend(i for i in range(50) if not torch.equal(product(seed), expected[seed]))

    callers = [threading.Thread(target=call, args=(seed,)) for seed in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


@needs_library
def test_a_forked_process_has_threads_of_its_own(own):
    torch.set_num_threads(2)
    expected = product()
    time.sleep(0.01)  # the other thread is asleep by now
    child = os.fork()
    if child == 0:
        os._exit(0 if all(torch.equal(product(), expected) for _ in range(20)) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(product(), expected)


@needs_library
def test_threads_that_sleep_wake_up_again(own):
    torch.set_num_threads(2)
    expected = product()
    for pause in (0, 1e-4, 4e-4, 1e-3, 5e-3):
        for _ in range(20):
            time.sleep(pause)
            assert torch.equal(product(), expected)


def chosen(code="import diffmas_ops.threads as t; print(t.CHOSEN)", **environment):
    clean = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "DIFFMAS_THREADS")}
    # Only the module: what the package imports behind it takes seconds.
    code = (
        "import sys, types; sys.modules['diffmas_ops'] = types.ModuleType('diffmas_ops'); "
        f"sys.modules['diffmas_ops'].__path__ = {list(sys.modules['diffmas_ops'].__path__)!r}; " + code
    )
    done = subprocess.run([sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True)
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


LATE = "sys.modules['torch'] = sys; import diffmas_ops.threads as t; print(t.CHOSEN)"


def test_choice_of_threads():
    assert chosen() == "own"
    assert chosen(LATE) == "openmp"
    assert chosen(LATE, GOMP_SPINCOUNT="1000") == "own"
    assert chosen(LATE, OMP_WAIT_POLICY="passive") == "own"
    assert chosen(OMP_WAIT_POLICY="ACTIVE") == "openmp"
    assert chosen(DIFFMAS_THREADS="openmp") == "openmp"
    assert chosen(LATE, DIFFMAS_THREADS="own") == "own"
    assert chosen(DIFFMAS_THREADS="tbb") == "ValueError: DIFFMAS_THREADS is 'tbb'; allowed: own, openmp, or unset"


def test_how_openmp_waits_is_said_once():
    spins = "import diffmas_ops.threads, os; print(os.environ.get('GOMP_SPINCOUNT'))"
    assert chosen(spins) == "10000"
    assert chosen(spins, GOMP_SPINCOUNT="7") == "7"
    assert chosen(spins, OMP_WAIT_POLICY="passive") == "None"
