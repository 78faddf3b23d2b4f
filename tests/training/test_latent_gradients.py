"""What a training logs of the gradients at its latent steps."""

import json

import pytest
import torch
from tiny_models import arguments, causal_lm, ragged, with_lora

from diffmas import train
from diffmas.agents.topology import load_topology
from diffmas.runs.metrics import LATENT_NORMS
from diffmas.system import MultiAgentSystem
from diffmas.training.latent_gradients import LatentGradients

M = 3


class Arguments:
    fp16 = False


def build(topology="stitch", **options):
    return MultiAgentSystem(with_lora(causal_lm("qwen3")), load_topology(topology), latent_steps=M, **options)


@pytest.mark.parametrize("topology", ["stitch", "sequential"])
def test_norms_are_those_of_the_inputs(topology):
    system = build(topology)
    watching, inputs = LatentGradients(system), []
    watching.on_train_begin(Arguments, None, None)

    def keep(alignment, arguments, aligned):
        if aligned.requires_grad:
            aligned.retain_grad()
            inputs.append(aligned)

    system.agent_model.alignment.register_forward_hook(keep)
    batch = arguments(*ragged([a.name for a in system.topology.agents], 2))
    assert watching.take() == {}
    for _ in range(2):
        with torch.no_grad():
            system(*batch)
        system(*batch).loss.backward()
    squares = torch.stack([x.grad.square().sum() for x in inputs]).view(2, 3, M)
    torch.testing.assert_close(torch.tensor(watching.take()[LATENT_NORMS]).double(), squares.mean(0).sqrt())
    assert watching.take() == {}
    watching.on_train_end(Arguments, None, None)
    system(*batch).loss.backward()
    assert watching.take() == {}


@pytest.mark.parametrize("options", [dict(detach_trace=True), dict(latent_backward="sweeps:2")], ids=str)
def test_nothing_is_said_of_steps_without_a_gradient_of_their_own(options):
    system = build(**options)
    watching = LatentGradients(system)
    watching.on_train_begin(Arguments, None, None)
    system(*arguments(*ragged([a.name for a in system.topology.agents], 2))).loss.backward()
    watching.on_train_end(Arguments, None, None)
    assert watching.take() == {}


def test_a_run_logs_and_shows_them(flags, tmp_path):
    assert train.main(flags(logging_steps=2, alignment="soft", disable_final_eval=True)) == 0
    entries = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    norms = [e[LATENT_NORMS] for e in entries if "loss" in e]
    assert len(norms) == 3 and all(len(of) == 1 and len(of[0]) == 2 and min(of[0]) > 0 for of in norms)
    assert not any(LATENT_NORMS in e for e in entries if "loss" not in e)
    assert "Gradients at latent steps" in (tmp_path / "run" / "report.html").read_text()
