"""A row's loss and gradient do not depend on the rows it shares a batch with."""

import pytest
import torch
import torch.nn.functional as F
from compare import assert_same, error, gradients
from tiny_models import arguments, causal_lm, clone, ragged, with_lora

from diffmas.agents.topology import load_topology
from diffmas.system import MultiAgentSystem

ROWS = 16


@pytest.mark.parametrize(
    "dtype, tolerance, topology, handover",
    [
        (torch.float64, 1e-10, "stitch", "latent"),
        (torch.float64, 1e-10, "relay", "full"),
        (torch.float32, 1e-5, "relay", "latent"),
    ],
)
def test_rows(dtype, tolerance, topology, handover, backend, poison):
    # The models' weights are large, so that attention is sharp; float32 rounding then grows a hundredfold on its way
    # through, whoever computes it. A milder model shows whether the rows, and not the rounding, agree.
    mild = {} if dtype == torch.float64 else {"initializer_range": 0.15}
    model = clone(with_lora(causal_lm("qwen3", dtype=dtype, **mild)))
    system = MultiAgentSystem(
        model, load_topology(topology, handover), latent_steps=2, alignment="learned", backend=backend
    )
    names = [a.name for a in system.topology.agents]
    prompts, answers = ragged(names, ROWS, longest=29)

    def row_alone(b):
        output = system(*arguments({n: [p[b]] for n, p in prompts.items()}, [answers[b]]))
        return output.loss, output.logits

    def row_in_batch(b):
        logits = system(*arguments(prompts, answers)).logits.split([len(a) for a in answers])[b]
        return F.cross_entropy(logits, answers[b]), logits

    def differentiate(run, b):
        system.zero_grad()
        loss, logits = run(b)
        loss.backward()
        return loss.detach(), logits.detach(), {n: g.clone() for n, g in gradients(system).items()}

    total: dict[str, torch.Tensor] = {}
    count = sum(map(len, answers))
    for b in range(ROWS):
        (loss, logits, grads), (loss_alone, logits_alone, alone) = (
            differentiate(run, b) for run in (row_in_batch, row_alone)
        )
        assert error(loss, loss_alone) <= tolerance
        assert error(logits, logits_alone) <= tolerance
        assert_same(grads, alone, tolerance)
        for name, grad in alone.items():
            total[name] = total.get(name, 0) + grad * (len(answers[b]) / count)

    system.zero_grad()
    system(*arguments(prompts, answers)).loss.backward()
    assert_same(gradients(system), total, tolerance)
