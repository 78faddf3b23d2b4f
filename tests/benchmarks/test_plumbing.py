"""What the benchmarks count, check and write; not how fast anything is."""

import dataclasses
import json
import sys

import pytest
import torch

from benchmarks import gpu_suite, operators, peers, report, step, timing
from benchmarks.cases import (
    Append,
    Attention,
    Concat,
    LatentRun,
    Merge,
    Project,
    Step,
    Work,
    operator_cases,
    step_cases,
)
from benchmarks.experiment import Contender, Experiment, WrongResult, measure

F32 = dict(dtype="float32")
TINY = [
    Attention(2, 5, 3, 4, 2, 8, **F32),
    Attention(2, 5, 1, 4, 2, 8, **F32),
    Attention(1, 0, 4, 4, 2, 8, **F32),
    LatentRun(2, 5, 3, 4, 2, 8, **F32),
    Append(2, 5, 3, 2, 8, **F32),
    Concat(3, 2, 2, 5, 2, 8, **F32),
    Project(3, 16, True, **F32),
    Project(3, 16, False, **F32),
    Merge(3, 4, 2, 8, **F32),
]
TINY_STEP = Step(2, 32, 48, 4, 2, 8, 64, 3, 9, 4, 3, 2, **F32)


class Counter(timing.Clock):
    """A clock that says every run took one second."""

    def __init__(self):
        self.runs = []

    def seconds(self, run, state):
        self.runs.append(state)
        run(state)
        return 1.0


@pytest.fixture
def clock():
    return Counter()


def nbytes(*tensors):
    return sum(t.nbytes for t in tensors)


@pytest.mark.parametrize("case", [c for c in TINY if isinstance(c, Attention)])
def test_flops_of_attention_by_enumeration(case):
    seen = sum(
        column <= position
        for position in range(case.prefix, case.prefix + case.new)
        for column in range(case.prefix + case.new)
    )
    per_pair = 4 * case.head_dim  # a product of a query and a key, one of a weight and a value
    assert case.forward().flops == case.batch * case.heads * seen * per_pair
    assert case.backward().flops == 2.5 * case.forward().flops


def test_bytes_are_those_of_the_tensors():
    case = TINY[0]
    q, trace = torch.empty(2, 3, 4, 8), torch.empty(2, 2, 2, 8, 8)
    new, lse, accumulators = torch.empty(2, 2, 3, 2, 8), torch.empty(2, 3, 4), torch.empty_like(trace)
    assert case.forward().bytes == nbytes(q, q, lse, trace, new)
    assert case.backward().bytes == nbytes(q, q, q, q, trace, accumulators, accumulators, new)
    traces, k = torch.empty(3, 2, 2, 2, 2, 5, 8), torch.empty(2, 2, 3, 2, 8)
    assert TINY[4].forward().bytes == 2 * nbytes(k)
    assert TINY[5].forward().bytes == 2 * nbytes(traces)
    hidden, weight = torch.empty(3, 16), torch.empty(16, 16)
    assert TINY[6].forward() == Work(2 * 3 * 16 * 16, nbytes(hidden, hidden, weight))
    assert TINY[7].forward() == Work(0, nbytes(hidden, hidden))


def test_a_latent_run_computes_what_its_steps_do():
    run = TINY[3]
    steps = [dataclasses.replace(TINY[1], prefix=run.prefix + t) for t in range(run.new)]
    assert run.forward().flops == sum(s.forward().flops for s in steps)
    assert run.forward().bytes == sum(s.forward().bytes for s in steps)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases_are_distinct_and_named(device):
    cases = [*operator_cases(device), *step_cases(device)]
    names = [(type(c).__name__, c.label) for c in cases]
    assert len(set(names)) == len(cases)
    assert all(label.isascii() for _, label in names)


@pytest.mark.parametrize("prefix, new", [(0, 5), (7, 5), (7, 1)])
def test_exact_attention_against_autograd(prefix, new):
    torch.manual_seed(0)
    columns = prefix + new
    shapes = [(2, 4, new, 8), (2, 2, columns, 8), (2, 2, columns, 8)]
    q, k, v = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    scores = q @ k.repeat_interleave(2, 1).mT * 8**-0.5
    hidden = torch.arange(columns) > torch.arange(prefix, columns)[:, None]
    out = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v.repeat_interleave(2, 1)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, (q, k, v), grad)
    with torch.no_grad():
        torch.testing.assert_close(peers.exact_attention(q, k, v)[0], out)
        for actual, gradient in zip(peers.exact_attention(q, k, v, grad), expected, strict=True):
            torch.testing.assert_close(actual, gradient)


@pytest.mark.parametrize("case", TINY, ids=lambda c: f"{type(c).__name__} {c.label}".replace(" ", "_"))
def test_every_experiment_runs_and_agrees(case, clock):
    for direction in operators.directions(case):
        result = json.loads(json.dumps(measure(operators.build(case, direction, "cpu"), seconds=0, clock=clock)))
        for contender in result["contenders"]:
            assert max(contender["errors"].values()) < 1e-5, (direction, contender)
        assert report.contender(result, result["ours"])["rounds"] == timing.MIN_ROUNDS


def test_step_agrees_and_saves_less(clock):
    result = measure(step.build(TINY_STEP, "cpu"), seconds=0, clock=clock)
    saved = {c["name"]: c["saved_bytes"] for c in result["contenders"]}
    assert all(max(c["errors"].values()) <= 1e-5 for c in result["contenders"])
    assert saved[step.CHECKPOINTED] < saved[step.OURS] < saved[step.PEER]


def test_race_interleaves_and_prepares_every_lap(clock):
    log = []
    contenders = {
        name: (lambda name=name: log.append(f"prepare {name}") or name, lambda state: log.append(f"run {state}"))
        for name in ("a", "b")
    }
    times = timing.race(contenders, clock, seconds=0, round_seconds=1)
    assert clock.runs == ["b", "a"] * timing.MIN_ROUNDS
    assert log.count("prepare a") == log.count("run a") == timing.MIN_ROUNDS
    assert times["a"] == timing.Timing(1.0, 1.0, 1.0, timing.MIN_ROUNDS)


def experiment(ours: float, plain: float = 1.001, **options) -> Experiment:
    def constant(x):
        return Contender(lambda _: (torch.tensor([x]),))

    return Experiment(
        operator="toy", direction="forward", case=TINY[0], work=Work(1, 1),
        contenders={"ours": constant(ours), "plain": constant(plain), "gone": "not installed"},
        ours="ours", implementations=("ours",), plain=("gone", "plain"), outputs=("x",),
        exact=lambda: (torch.tensor([1.0]),), **options,
    )  # fmt: skip


def test_no_time_without_a_right_result(clock):
    assert measure(experiment(1.0015), seconds=0, clock=clock)["allowed_error"]["x"] == pytest.approx(0.002, rel=1e-3)
    for wrong in (experiment(1.003), experiment(float("nan")), experiment(1.0015, tolerance=1e-3)):
        clock.runs.clear()
        with pytest.raises(WrongResult, match=r"toy forward, .*: error of x by ours"):
            measure(wrong, seconds=0, clock=clock)
        assert not clock.runs


def test_a_peer_that_computes_something_else_is_no_peer(clock):
    result = measure(experiment(1.0, tolerance=1e-3, plain=2.0), seconds=0, clock=clock)
    assert "wrong result" in report.contender(result, "plain")["unavailable"]
    assert report.best_peer(result) is None


def suite(folder, measures, **options):
    results = gpu_suite.Results(folder)
    results.data |= {"ceilings": {"copy": 1e9, "float32": 1e9}, "environment": {"device": "toy"}}
    gpu_suite.run_cases(results, iter(measures.items()), **options)
    return results


def test_a_suite_cut_off_leaves_what_it_has(tmp_path, clock):
    def fine():
        return measure(experiment(1.001), seconds=0, clock=clock)

    def broken():
        raise RuntimeError("no such kernel")

    def killed():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        suite(tmp_path, {"a": fine, "b": broken, "c": killed, "d": fine}, deadline=1e9, clock=lambda: 0)
    data = json.loads((tmp_path / report.RESULTS_FILE).read_text())
    assert len(data["results"]) == 1 and not data["complete"]
    assert data["failures"] == [{"case": "b", "error": "RuntimeError: no such kernel"}]
    ticks = iter(range(10))
    results = suite(tmp_path, dict.fromkeys("abcd", fine), deadline=1, clock=lambda: next(ticks))
    assert len(results.data["results"]) == 2 and not results.data["complete"]
    assert suite(tmp_path, {"a": fine}, deadline=1, clock=lambda: 0).data["complete"]


def test_checks_are_recorded_and_end_in_time(tmp_path):
    results = gpu_suite.Results(tmp_path)
    gpu_suite.check(results, "fails", [sys.executable, "-c", "import sys; print('why'); sys.exit(3)"], 60)
    gpu_suite.check(results, "hangs", ["sh", "-c", "sleep 600 & wait"], 1)
    fails, hangs = json.loads((tmp_path / report.RESULTS_FILE).read_text())["checks"]
    assert fails["returncode"] == 3 and "why" in fails["tail"]
    assert hangs["returncode"] < 0 and "not finished after 1 s" in hangs["tail"]


def test_report_of_a_folder(tmp_path, clock):
    measures = {str(c): lambda c=c: measure(operators.build(c, "forward", "cpu"), seconds=0, clock=clock) for c in TINY}
    suite(tmp_path, measures, deadline=1, clock=lambda: 0)
    text = report.write(tmp_path).read_text()
    assert text.count("←") == len(TINY) + 1  # one a case, and the legend
    assert "1 GB/s copy, 1 GFLOP/s float32 matmul" in text and "run: complete" in text
    for plot in ("speedup.svg", "ceiling.svg"):
        assert plot in text and (tmp_path / plot).read_text().rstrip().endswith("</svg>")
    with pytest.raises(FileNotFoundError, match=r"results\.json"):
        report.write(tmp_path / "nothing")
