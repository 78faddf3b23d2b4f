"""What the benchmarks count, check and write; not how fast anything is."""

import dataclasses
import json
import sys

import pytest
import torch

from benchmarks import gpu_suite, layers, model_steps, operators, peers, report, step, timing
from benchmarks.cases import (
    Append,
    Attention,
    Concat,
    LatentRollout,
    Merge,
    Project,
    Step,
    Work,
    operator_cases,
    step_cases,
)
from benchmarks.experiment import Contender, Experiment, WrongResult, measure
from diffmas_ops import library

F32 = dict(dtype="float32")
TINY = [
    Attention(2, 5, 3, 4, 2, 8, **F32),
    Attention(2, 5, 1, 4, 2, 8, **F32),
    Attention(1, 0, 4, 4, 2, 8, **F32),
    LatentRollout(2, 5, 3, 4, 2, 8, **F32),
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


def test_a_latent_rollout_computes_what_its_steps_do():
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


def test_whole_models_are_raced_with_the_peer(clock):
    for result in (
        model_steps.whole(TINY_STEP, "cpu", clock, seconds=0),
        model_steps.latent_rollout(TINY_STEP, "cpu", clock, seconds=0),
    ):
        peer, *ours = (json.loads(json.dumps(result)))["contenders"]
        captured = ours.pop()
        assert captured["name"] == step.CAPTURED and "not captured" in captured["unavailable"]
        assert peer["name"] == step.PEER and "errors" not in peer and peer["median_s"]
        assert ours and all(max(c["errors"].values()) <= 1e-4 and c["peak_bytes"] > 0 for c in ours)
        assert len(list(report.rows(result, {"copy": 1e9, "float32": 1e9}))) == 2 + len(ours)


def test_a_model_that_does_not_fit_says_so(clock):
    def full(_):
        raise torch.OutOfMemoryError("full")

    def constant(x):
        return Contender(lambda _: (torch.tensor([x]),))

    def run(**changes):
        contenders = dict(ours=constant(1.0), plain=constant(1.0)) | changes
        return model_steps.race_what_fits(
            "toy", "step", TINY_STEP, Work(1, 1), contenders, ("ours",), "plain", "cpu", clock, seconds=0,
            outputs=("x",),
        )  # fmt: skip

    result = run(plain=Contender(full))
    plain, ours = result["contenders"]
    assert plain["unavailable"] == "out of memory" and ours["median_s"] and "errors" not in ours
    assert report.speedup(result) is None and len(list(report.rows(result, {"copy": 1e9, "float32": 1e9}))) == 2
    with pytest.raises(RuntimeError, match="toy step, layers .* ours does not run .*out of memory"):
        run(ours=Contender(full))
    with pytest.raises(WrongResult, match="errors of ours"):
        run(ours=constant(1.2))


@pytest.mark.parametrize("most", [0, 1, 2, 3, 5, 24, 31, 32])
def test_largest_batch(most):
    tried = []
    found = model_steps.largest_batch(lambda batch: tried.append(batch) or batch <= most)
    assert found <= most and found >= 0.75 * most and len(tried) <= 9
    assert model_steps.largest_batch(lambda batch: True, limit=8) == 8


def test_largest_batches_of_a_step():
    found = model_steps.batches_that_fit(TINY_STEP, "cpu", limit=1)
    assert [(f["name"], f["batch"]) for f in found] == [(n, 1) for n in (step.OURS, step.CHECKPOINTED, step.PEER)]
    assert all(f["peak_bytes"] > 0 for f in found)


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
    assert measure(experiment(1.003, floor=0.004), seconds=0, clock=clock)["allowed_error"]["x"] == 0.004
    not_a_number, too_far = experiment(float("nan")), experiment(1.005, floor=0.004)
    for wrong in (experiment(1.003), too_far, not_a_number, experiment(1.0015, tolerance=1e-3)):
        with pytest.raises(WrongResult, match=r"toy forward, .*: error of x by ours"):
            measure(wrong, seconds=0, clock=clock)


def test_a_peer_that_computes_something_else_is_no_peer(clock):
    result = measure(experiment(1.0, tolerance=1e-3, plain=2.0), seconds=0, clock=clock)
    plain = report.contender(result, "plain")
    assert "wrong result" in plain["unavailable"] and "median_s" not in plain
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


@pytest.mark.parametrize(
    "device, cmake, sanitizer", [("cuda", None, None), ("cuda", "cmake", "tool"), ("cpu", None, None)]
)
def test_what_is_checked(tmp_path, monkeypatch, device, cmake, sanitizer):
    """In a time that is there, and nothing that a machine lacks."""
    called = []
    monkeypatch.setattr(gpu_suite, "check", lambda _, name, command, seconds, variables=None: called.append(
        (name, command, seconds)))  # fmt: skip
    monkeypatch.setattr(gpu_suite.shutil, "which", lambda name, path=None: cmake)
    monkeypatch.setattr(gpu_suite, "_sanitizer", lambda: sanitizer)
    results = gpu_suite.Results(tmp_path)
    gpu_suite.run_checks(results, device, 100)
    names = [name for name, *_ in called]
    on_gpu = ["CUDA operators", "Triton operators, schemas", "system"] + ["memcheck", "racecheck"] * bool(sanitizer)
    assert names == ["build"] * bool(cmake) + ["libraries"] + (on_gpu if device == "cuda" else ["tests"])
    assert all(0 < seconds <= 100 for *_, seconds in called)
    assert [c["name"] for c in results.data["checks"]] == (["sanitizer"] if device == "cuda" and not sanitizer else [])
    for _, command, _ in called:
        assert all((gpu_suite.ROOT / word).exists() for word in command if word.startswith("tests/"))


def test_parts_of_the_suite(monkeypatch):
    monkeypatch.setattr(timing, "Clock", lambda device: None)
    names = {p: [n for n, _ in gpu_suite.experiments("cuda", (p,))] for p in gpu_suite.PARTS}
    whole = [n for n, _ in gpu_suite.experiments("cuda", gpu_suite.PARTS)]
    assert not names["checks"] and sorted(whole) == sorted(names["operators"] + names["steps"])
    for kind in ("checked step", "step", "latent steps", "largest batch"):
        assert sum(n.startswith(f"{kind}: layers 36") for n in whole) >= 2


def test_report_of_a_folder(tmp_path, clock):
    measures = {str(c): lambda c=c: measure(operators.build(c, "forward", "cpu"), seconds=0, clock=clock) for c in TINY}
    suite(tmp_path, measures, deadline=1, clock=lambda: 0)
    data = json.loads((tmp_path / report.RESULTS_FILE).read_text())
    data["checks"] = [
        dict(name="build", returncode=0),
        dict(name="tests", returncode=1),
        dict(name="tool", skipped="-"),
    ]
    data["largest batches"] = [dict(name="plain", label="toy", batch=3, peak_bytes=2e9)]
    (tmp_path / report.RESULTS_FILE).write_text(json.dumps(data))
    text = report.write(tmp_path).read_text()
    assert "checks: build ok, tests FAILED, tool -" in text and "| toy | plain | 3 | 2 GB |" in text
    assert text.count("←") == len(TINY) + 1  # one a case, and the legend
    assert "1 GB/s copy, 1 GFLOP/s float32 matmul" in text and "run: complete" in text
    for plot in ("speedup.svg", "ceiling.svg"):
        assert plot in text and (tmp_path / plot).read_text().rstrip().endswith("</svg>")
    with pytest.raises(FileNotFoundError, match=r"results\.json"):
        report.write(tmp_path / "nothing")


@pytest.mark.skipif(library.failure("cpu") is not None, reason=str(library.failure("cpu")))
def test_layers_against_their_own_modules(monkeypatch):
    monkeypatch.setattr(layers, "LATENT", 1)
    monkeypatch.setattr(layers, "NEW", 2)
    found = layers.measure("gemma2", 1, hidden_size=16, intermediate_size=24, head_dim=8)
    assert all(run["fused_s"] > 0 and run["error"] < 1e-5 for run in found.values())
    machine = dict(device="a processor", torch="2", transformers="5")
    table = layers.table({"machine": machine, "laps": 1, "families": {"gemma2": found}})
    assert "| `gemma2` | " in table and "Fastest of 1 laps" in table
    results = iter(torch.eye(2))
    monkeypatch.setattr(layers, "step", lambda system: next(results))
    with pytest.raises(WrongResult, match="relative difference"):
        layers.measure("gemma2", 1, hidden_size=16, intermediate_size=24, head_dim=8)
