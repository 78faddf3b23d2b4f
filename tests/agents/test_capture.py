"""Recorded latent rollouts: everything but the graphs themselves on the CPU, the graphs where there is a GPU.

`Eager` runs what would be captured, and leaves its results where a graph would: a result that is read too late, a
buffer that is shared by two that live at once, or bookkeeping that only the recording does shows as a wrong gradient.
"""

import gc
import warnings
import weakref
from dataclasses import replace
from functools import cache

import pytest
import torch
from compare import assert_same, error, gradients
from tiny_models import arguments, causal_lm, clone, ragged, with_lora

from diffmas.agents.captured_rollouts import CapturedRollouts, CudaGraphs, Eager
from diffmas.agents.latent_rollouts import step_by_step
from diffmas.agents.topology import TOPOLOGIES, Topology
from diffmas.system import MultiAgentSystem
from diffmas.training.profiling import watch
from diffmas_ops import KVTrace
from diffmas_ops.errors import CapacityError

TOLERANCE = 1e-10


@cache
def lora_model(dtype):
    return with_lora(causal_lm("qwen3", dtype=dtype))


def build(topology="sequential", handover="full", sink=0, *, runs=None, device="cpu", dtype=torch.float64, **options):
    chosen = TOPOLOGIES[topology]
    system = MultiAgentSystem(
        clone(lora_model(dtype)).train().to(device), Topology(chosen.name, chosen.agents, handover, sink),
        **dict(latent_steps=3, alignment="learned") | options,
    ).to(device)  # fmt: skip
    if runs is not None:
        system.trajectory = replace(system.trajectory, latent_rollout=runs, allocate=runs.allocate)
    return system


def on_cpu(bucket=64):
    return CapturedRollouts(Eager, devices=("cpu",), bucket=bucket)


def batch(system, seed, rows=3, longest=11):
    inputs = arguments(*ragged([a.name for a in system.topology.agents], rows, seed=seed, longest=longest))
    device = system.agent_model.language_model.device
    return [
        x.to(device) if isinstance(x, torch.Tensor) else x for x in ([y.to(device) for y in inputs[0]], *inputs[1:])
    ]


def train(system, steps=4, rows=3, accumulate=2):
    """Losses and gradients of `steps` steps, with batches of their own lengths and an update after every other."""
    optimizer = torch.optim.SGD([p for p in system.parameters() if p.requires_grad], lr=0.05)
    losses, grads = [], []
    for step in range(steps):
        loss = system(*batch(system, step, rows)).loss
        loss.backward()
        losses.append(loss.detach())
        del loss  # it holds its trajectory's buffers
        grads.append({n: g.clone() for n, g in gradients(system).items()})
        if step % accumulate:
            optimizer.step()
            optimizer.zero_grad()
    return torch.stack(losses), grads


def assert_equal_training(got, wanted, tolerance=TOLERANCE):
    assert error(got[0], wanted[0]) <= tolerance
    for actual, expected in zip(got[1], wanted[1], strict=True):
        assert_same(actual, expected, tolerance)


@pytest.mark.parametrize(
    "topology, handover, backend",
    [
        *[(topology, h, "auto") for topology in ("sequential", "hierarchical") for h in ("full", "latent")],
        ("stitch", "full", "auto"),
        ("relay", "latent", "auto"),
        ("sequential", "full", "reference"),
    ],
)
@pytest.mark.usefixtures("poison")
def test_training_is_that_of_step_by_step(topology, handover, backend):
    """Several steps of changing lengths, gradients accumulated, parameters updated in between."""
    runs = on_cpu()
    got = train(build(topology, handover, runs=runs, backend=backend))
    assert_equal_training(got, train(build(topology, handover, backend=backend)))
    agents = len(TOPOLOGIES[topology].agents) - 1
    # Made in the first step, replayed in the others.
    assert len(runs._recordings) == agents and all(runs._recordings.values())


@pytest.mark.parametrize(
    "options",
    [
        dict(detach_trace=True),
        dict(checkpointing="prefill"),
        dict(alignment="identity"),
        dict(alignment="soft", alignment_temperature_learned=True, latent_grad_clip=0.8),
    ],
)
def test_with_other_options(options):
    runs = on_cpu()
    assert_equal_training(train(build(runs=runs, **options)), train(build(**options)))
    assert all(runs._recordings.values()) and len(runs._recordings) == 3


def test_behind_a_sink():
    runs = on_cpu()
    got = train(build("senders", "latent", 1, runs=runs))
    assert_equal_training(got, train(build("senders", "latent", 1)))
    assert all(runs._recordings.values()) and len(runs._recordings) == 2


def test_prompts_of_one_token():
    """Single-token calls right before and behind a run have a run of their own."""

    def once(system):
        system(*batch(system, 0, rows=2, longest=1)).loss.backward()
        return gradients(system)

    assert_same(once(build(runs=on_cpu())), once(build()), TOLERANCE)


def test_two_trajectories_at_once():
    """The second does not write over what the first one's backward reads."""

    def both(system, first):
        losses = [system(*batch(system, seed)).loss for seed in (0, 1)]
        losses[first].backward()
        losses[1 - first].backward()
        return gradients(system)

    for first in (0, 1):
        assert_same(both(build(runs=on_cpu()), first), both(build(), first), TOLERANCE)


def test_buckets_and_buffers_are_used_again():
    runs = on_cpu(bucket=128)
    system = build(runs=runs)
    addresses = set()
    for seed in range(3):
        output = system(*batch(system, seed))
        output.loss.backward()
        del output
        addresses |= {b.stacks[0].keys.data_ptr() for free in runs._free.values() for b in free}
    assert len(addresses) == 1 and len(runs._recordings) == 3
    with torch.no_grad():
        system(*batch(system, 0))
    assert len(runs._recordings) == 6  # runs without gradients are other ones
    with torch.no_grad(), system.agent_model.model.disable_adapter():
        without = system(*batch(system, 0)).loss
    plain = build()
    with torch.no_grad(), plain.agent_model.model.disable_adapter():
        torch.testing.assert_close(without, plain(*batch(plain, 0)).loss)
    assert len(runs._recordings) == 9  # and so are those without the adapter


def test_nothing_lives_longer_than_the_system():
    system = build(runs=on_cpu())
    system(*batch(system, 0)).loss.backward()
    seen = weakref.ref(system)
    gc.collect()
    gc.disable()
    try:
        del system
        assert seen() is None
    finally:
        gc.enable()


def test_a_trajectory_is_differentiated_once():
    system = build(runs=on_cpu())
    loss = system(*batch(system, 0)).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a trace can be differentiated once"):
        loss.backward()


class Fails(Eager):
    def record(self, bodies):
        raise RuntimeError("operation not permitted when stream is capturing")


def test_what_cannot_be_captured_runs_step_by_step_and_says_why_once():
    runs = CapturedRollouts(Fails, devices=("cpu",), bucket=64)
    with pytest.warns(UserWarning, match="step by step, not captured: RuntimeError: operation not permitted") as caught:
        got = train(build(runs=runs))
    assert len([w for w in caught if "not captured" in str(w.message)]) == 1
    assert_equal_training(got, train(build()))
    system = build(runs=on_cpu())
    with watch(system, lambda name: None), pytest.warns(UserWarning, match="not captured: calls are watched"):
        system(*batch(system, 0))
    with pytest.warns(UserWarning, match="not captured: activations of latent steps are checkpointed"):
        got = train(build(runs=on_cpu(), checkpointing="all"))
    assert_equal_training(got, train(build()))


def test_settings():
    assert build().trajectory.latent_rollout is build(cuda_graphs="off").trajectory.latent_rollout is step_by_step
    system = build(cuda_graphs="auto")
    assert isinstance(system.trajectory.latent_rollout, CapturedRollouts)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert_equal_training(train(system, steps=1), train(build(), steps=1))  # nothing to capture on a CPU
    with pytest.raises(ValueError, match="cuda_graphs is 'on'; allowed: off, auto"):
        build(cuda_graphs="on")
    with pytest.raises(ValueError, match="latent_backward is 'sweeps:2' with cuda_graphs 'auto'; allowed: exact"):
        build(cuda_graphs="auto", latent_backward="sweeps:2")


def test_skipped_columns():
    trace = KVTrace.allocate(num_layers=1, batch=2, num_kv_heads=1, capacity=8, head_dim=4)
    first = trace.open(1)
    streak = trace.skip(4)
    assert streak is not first.streak and streak.starts.tolist() == [1, 1]
    assert trace.lengths.tolist() == trace.host_lengths == [5, 5]
    assert trace.open(1).streak not in (first.streak, streak)
    with pytest.raises(CapacityError, match="needs 9 columns"):
        trace.skip(3)
    assert trace.host_lengths == [6, 6]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is False")
@pytest.mark.parametrize("topology, handover", [("sequential", "full"), ("sequential", "latent"), ("stitch", "full")])
def test_graphs(topology, handover):
    options = dict(device="cuda", dtype=torch.float32)
    runs = CapturedRollouts(CudaGraphs, bucket=64)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        got = train(build(topology, handover, runs=runs, **options))
    assert runs._recordings and all(runs._recordings.values())
    assert_equal_training(got, train(build(topology, handover, **options)), 1e-4)
