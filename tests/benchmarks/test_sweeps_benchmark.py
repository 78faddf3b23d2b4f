"""The benchmark of sweeps checks before it times, and renders what it kept."""

import pytest

from benchmarks import sweeps
from benchmarks.cases import Step
from benchmarks.experiment import WrongResult
from benchmarks.step import lora_model, tokens
from benchmarks.timing import MIN_ROUNDS, Clock
from diffmas.agents.sweeps import Sweeps, latent_rollout
from diffmas.agents.topology import TOPOLOGIES
from diffmas.system import MultiAgentSystem

CASE = Step(2, 32, 48, 4, 2, 8, 64, 2, 7, 3, 4, 2, "float32")


@pytest.fixture
def case():
    prompts, answer = tokens(CASE, "cpu")
    system = MultiAgentSystem(lora_model(CASE, "cpu"), TOPOLOGIES["relay"], latent_steps=CASE.latent)
    inputs = dict(
        prompt_ids=[p.flatten() for p in prompts], prompt_lengths=[[CASE.prompt] * CASE.batch] * CASE.agents,
        answer_ids=answer.flatten(), answer_lengths=[CASE.answer] * CASE.batch,
    )  # fmt: skip
    return "toy", system, inputs


def test_measured_and_rendered(case, tmp_path):
    measured = sweeps.measure(*case, seconds=0, clock=Clock("cpu"))
    assert [row["latent_backward"] for row in measured["rows"]] == ["exact", "sweeps:1", "sweeps:2", "sweeps:3"]
    assert all(row["rounds"] == MIN_ROUNDS for row in measured["rows"])
    errors = [row["error"] for row in measured["rows"]]
    assert errors[0] == 0 and errors[3] < sweeps.TOLERANCE < errors[2] < errors[1]
    run = dict(accuracy=0.5, accuracy_mismatched=0.25, accuracy_training_free=0.125, curve=[(1, 0.5)])
    training = [dict(latent_backward=name, seed=seed, **run) for seed in (3, 4) for name in ("exact", "sweeps:2")]
    machine = dict(device="toy", threads=1, torch="t", transformers="t")
    results = dict(machine=machine, cases=[measured], training=training)
    text = sweeps.tables(results)
    assert "| exact | – | 1.0000 | 1.00 |" in text and text.count("\n| sweeps:2 | ") == 2
    assert "| sweeps:2 | 50.0 % | 50.0 % | 25.0 % | 25.0 % |" in text
    sweeps.plot(results, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").read_text().rstrip().endswith("</svg>")


def test_no_time_without_the_exact_gradient(case, monkeypatch):
    monkeypatch.setattr(sweeps, "latent_rollout", lambda n: Sweeps(2) if n == "sweeps:3" else latent_rollout(n))
    with pytest.raises(WrongResult, match="toy: error of sweeps:3 is"):
        sweeps.measure(*case, seconds=0, clock=None)
