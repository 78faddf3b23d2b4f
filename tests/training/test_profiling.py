"""The profile of a step: phases add up, each delay shows in its own phase, files and report."""

import json

import pytest
import torch
from tiny_models import causal_lm, with_lora

from diffmas import train
from diffmas.agents.costs import BACKWARD, PHASES
from diffmas.agents.topology import TOPOLOGIES, load_topology
from diffmas.system import MultiAgentSystem
from diffmas.training import profiling
from diffmas.training.profiling import OPTIMIZER, OTHER, Phases, watch


class Clock:
    """Stands still but for `wait`."""

    now = 0

    def time_ns(self):
        return self.now

    def wait(self):
        self.now += 10**9


class Slow(torch.autograd.Function):
    """The identity, whose backward takes a while."""

    @staticmethod
    def forward(ctx, x, clock):
        ctx.clock = clock
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.clock.wait()
        return grad, None


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("options", [{}, {"checkpointing": "all"}, {"latent_backward": "sweeps:1"}], ids=str)
def test_a_delay_shows_in_its_phase(phase, backward, options, monkeypatch):
    monkeypatch.setattr(profiling, "time", clock := Clock())
    if backward and phase == "prefill" and "latent_backward" in options:
        # Sweeps differentiate an agent's prompt and latent steps as one.
        phase = "latent"
    model = with_lora(causal_lm("qwen3", dtype=torch.float32), embeddings=False).train()
    system = MultiAgentSystem(model, TOPOLOGIES["relay"], latent_steps=2, **options)
    tokens = {"prefill": 7, "answer": 5}

    def slow_down(module, args, output):
        # Calls of one row are told apart by their tokens.
        calls = output.shape[1]
        if calls == tokens.get(phase) or (phase == "latent" and calls not in tokens.values()):
            if backward:
                return Slow.apply(output, clock)
            # Not in a re-run, which is the backward's time.
            if torch._C._current_graph_task_id() == -1:
                clock.wait()
        return output

    system.agent_model.language_model.get_decoder().layers[0].register_forward_hook(slow_down)
    mark = Phases(torch.device("cpu"))
    ids = torch.arange(7)
    with watch(system, mark) as batches:
        mark(OTHER)
        system([ids, ids[:3]], [[7], [3]], ids[:2], [2], return_logits=False).loss.backward()
        mark("end")
    assert batches == [([[7], [3]], [2])]
    spent = mark.seconds()
    assert {name for name, seconds in spent.items() if seconds} == {phase + BACKWARD * backward}, spent
    assert clock.now == 1e9 * sum(spent.values())
    assert len(spent) >= 6
    assert "run" not in vars(system) and not system._forward_hooks and not system._forward_pre_hooks


def test_what_comes_over_a_bridge_is_read_as_a_prompt_is():
    model = with_lora(causal_lm("qwen3", dtype=torch.float32), embeddings=False).train()
    system, ids, marks = MultiAgentSystem(model, load_topology("relay", "bridge"), latent_steps=2), torch.arange(3), []
    with watch(system, marks.append):
        system([ids, ids], [[3], [3]], ids[:2], [2], return_logits=False).loss.backward()
    assert marks[:5] == ["prefill", "latent", "latent", "prefill", "answer"]
    backward = [mark.removesuffix(BACKWARD) for mark in marks[5:] if mark != OTHER]
    assert list(dict.fromkeys(backward)) == ["answer", "prefill", "latent"]


def test_profile_of_a_run(flags, tmp_path):
    assert train.main(flags(profile=True, max_steps=3, disable_final_eval=True)) == 0
    run = tmp_path / "run"
    profile = json.loads((run / "profile.json").read_text())
    phases = profile["phases"]
    assert set(phases) == {*PHASES, *(p + BACKWARD for p in PHASES), OPTIMIZER, OTHER}
    assert all(phase["seconds"] > 0 for phase in phases.values())
    assert sum(phase["seconds"] for phase in phases.values()) == pytest.approx(profile["seconds"], rel=0.05, abs=5e-3)
    floors = [phase["floor_seconds"] for phase in phases.values() if "floor_seconds" in phase]
    assert len(floors) == 6 and sum(floors) == pytest.approx(profile["floor_seconds"])
    assert 0 < profile["floor_ratio"] < 1 and 0 < profile["model_flops_utilisation"] < 1
    assert profile["micro_batches"] == 2 and profile["tokens"] > 8
    report = (run / "report.html").read_text()
    assert "One step" in report and "latent backward" in report

    events = json.loads((run / "trace.json").read_text())["traceEvents"]
    spans = [e for e in events if e.get("cat") == "phase"]
    assert {e["name"] for e in spans} == set(phases)
    # The track lies over the operators: a layer's backward runs while a backward phase does.
    backward = [e for e in events if "DecoderLayerBackward" in e.get("name", "") and e.get("ph") == "X"]
    assert backward

    def inside(event):
        middle = event["ts"] + event["dur"] / 2
        return [s["name"] for s in spans if s["ts"] <= middle <= s["ts"] + s["dur"]]

    assert all(len(found := inside(e)) == 1 and found[0].endswith(BACKWARD) for e in backward)
