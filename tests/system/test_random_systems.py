"""Random DAGs, lengths, latent steps and options against the oracle."""

import pytest
from compare import assert_same, error, gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Soft, batch
from tiny_models import VOCAB, arguments, causal_lm, clone, with_lora
from torch import tensor

from diffmas.agents.topology import Agent, Topology
from diffmas.system import MultiAgentSystem

TOLERANCE = 1e-10
pytestmark = pytest.mark.usefixtures("poison")


@st.composite
def dags(draw):
    """Agent -> senders, in an order that need not be the one the topology sorts into."""
    count = draw(st.integers(1, 5))
    senders = {}
    for i in range(count):
        earlier = list(senders)
        senders[f"a{i}"] = draw(st.lists(st.sampled_from(earlier), unique=True, max_size=3)) if earlier else []
    last = f"a{count - 1}"
    unread = [n for n in senders if n != last and not any(n in s for s in senders.values())]
    senders[last] += unread
    return {n: tuple(s) for n, s in senders.items()}


tokens = st.integers(0, VOCAB - 1)


@st.composite
def batches(draw, names, shortest):
    rows = draw(st.integers(1, 3))

    def many(least):
        one = st.lists(tokens, min_size=least, max_size=6).map(tensor)
        return draw(st.lists(one, min_size=rows, max_size=rows))

    return {n: many(shortest) for n in names}, many(1)


@settings(max_examples=25)
@given(data=st.data())
def test_random_systems(backend, data):
    dag = data.draw(dags())
    handover, sink = (data.draw(s) for s in (st.sampled_from(["full", "latent"]), st.integers(0, 2)))
    topology = Topology("random", tuple(Agent(*a) for a in dag.items()), handover, sink)
    latent_steps, detach, checkpointing = (data.draw(s) for s in (st.integers(0, 3), st.booleans(), st.booleans()))
    prompts, answers = data.draw(batches([a.name for a in topology.agents], max(1, sink)))
    soft = data.draw(st.none() | st.builds(Soft, st.floats(0.5, 2), st.integers(0, 5), st.none() | st.floats(0.3, 3)))

    model = with_lora(causal_lm("qwen3")).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    alignment = {} if soft is None else soft.options()
    system = MultiAgentSystem(
        model, topology, latent_steps=latent_steps, detach_trace=detach, backend=backend, **alignment
    )
    output = system(*arguments(prompts, answers))
    output.loss.backward()

    twin = clone(model)
    twin.zero_grad()
    # Handed-over segments stand in the topology's order, which is the oracle's only word of ours.
    dag = {a.name: a.senders for a in topology.agents}
    options = dict(handover=topology.handover, latent_steps=latent_steps, detach=detach, soft=soft, sink=sink)
    loss, logits = batch(twin, dag, prompts, answers, **options)
    loss.backward()
    assert error(output.loss, loss) <= TOLERANCE
    assert error(output.logits, logits) <= TOLERANCE
    assert_same(gradients(model), gradients(twin), TOLERANCE)
