"""Recurrent layers: a chain of agents is one forward over all its inputs, row by row; other topologies are refused."""

import copy
import gc
import weakref
from functools import cache
from importlib import import_module

import pytest
import torch
import transformers
from compare import assert_same, error, gradients
from hybrids import FAMILIES, TARGETS, batch, chain, hybrid, in_double, read
from tiny_models import arguments, packed, ragged, with_lora
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionLayer

from diffmas.agents.controls import mismatched, noise, zero
from diffmas.agents.topology import Agent, Topology, load_topology
from diffmas.agents.trajectory import HandedOver
from diffmas.models.errors import UnsupportedModelError
from diffmas.system import MultiAgentSystem
from diffmas_ops import KVTrace, Segment, kv_concat

TOLERANCE = 1e-10
CHAIN = Topology("chain", (Agent("planner"), Agent("critic", ("planner",)), Agent("solver", ("critic",))))
NAMES = [agent.name for agent in CHAIN.agents]
ROWS, STEPS = 4, 2


@cache
def adapted(family):
    """Everything trains, base weights (decays, convolutions, experts) and adapters."""
    return with_lora(hybrid(family), targets=TARGETS).requires_grad_()


def stock(model):
    twin = copy.deepcopy(model)
    twin.get_base_model().set_attn_implementation("eager")
    return twin


def system_of(family, **options):
    return MultiAgentSystem(copy.deepcopy(adapted(family)).train(), CHAIN, latent_steps=STEPS, **options)


@cache
def expected(family):
    model = stock(adapted(family))
    with in_double():
        loss, logits = batch(model.get_base_model(), *ragged(NAMES, ROWS), STEPS)
        loss.backward()
    return loss.detach(), logits.detach(), gradients(model)


def check(system, family):
    loss, logits, grads = expected(family)
    with in_double():
        output = system(*arguments(*ragged(NAMES, ROWS)))
        output.loss.backward()
    assert error(output.loss, loss) <= TOLERANCE
    assert error(output.logits, logits) <= TOLERANCE
    assert_same(gradients(system.agent_model.model), grads, TOLERANCE)


@pytest.mark.parametrize("checkpointing", ["none", "prefill", "all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_chain(family, checkpointing):
    check(system_of(family, checkpointing=checkpointing), family)


def worst(actual, wanted):
    """Of the gradients, on a scale of 1e-3 of the largest."""
    largest = max(float(g.norm()) for g in wanted.values())
    return max(error(actual[name], gradient, 1e-3 * largest) for name, gradient in wanted.items())


@pytest.mark.parametrize("family, most", [("qwen3_next", 1e-2), ("lfm2", 3e-4)])
def test_float32_is_as_far_off_as_the_model_alone(family, most):
    """A gated delta rule is ill-conditioned; three times as far is the limit for gradients in low precision."""
    model = stock(adapted(family)).float()
    batch(model.get_base_model(), *ragged(NAMES, ROWS), STEPS)[0].backward()
    system = MultiAgentSystem(copy.deepcopy(adapted(family)).float().train(), CHAIN, latent_steps=STEPS)
    system(*arguments(*ragged(NAMES, ROWS))).loss.backward()
    wanted = expected(family)[2]
    ours, alone = worst(gradients(system.agent_model.model), wanted), worst(gradients(model), wanted)
    print(f"\n{family}: {ours:.1e} over a trace, {alone:.1e} alone")
    assert ours <= 3 * alone <= 3 * most


@pytest.mark.parametrize("family", ["qwen3_next", "bamba"])
def test_detached_trace(family, monkeypatch):
    # transformers writes over the state that autograd has saved.
    def replace(self, recurrent_states, state_idx=0, **kwargs):
        self.recurrent_states[state_idx] = recurrent_states

    monkeypatch.setattr(LinearAttentionLayer, "update_recurrent_state", replace)
    system, model = system_of(family, detach_trace=True), stock(adapted(family))
    base, (prompts, answers) = model.get_base_model(), ragged(NAMES, ROWS)
    logits = []
    with in_double():
        for row, answer in enumerate(answers):
            cache, rows = DynamicCache(config=base.config), [prompts[name][row] for name in NAMES]
            with torch.no_grad():
                before = torch.cat(chain(base, rows, STEPS)[:-1])[None]
                base.get_decoder()(inputs_embeds=before, past_key_values=cache, use_cache=True)
            ids = torch.cat((rows[-1], answer))[None]
            hidden = base.get_decoder()(
                input_ids=ids, past_key_values=cache, use_cache=True,
                position_ids=before.shape[1] + torch.arange(ids.shape[1])[None],
            ).last_hidden_state[0]  # fmt: skip
            logits.append(base.get_output_embeddings()(hidden[len(rows[-1]) - 1 : -1]))
        loss = torch.nn.functional.cross_entropy(torch.cat(logits), torch.cat(answers))
        loss.backward()
        output = system(*arguments(prompts, answers))
        output.loss.backward()
    assert error(output.logits, torch.cat(logits)) <= TOLERANCE
    assert_same(gradients(system.agent_model.model), gradients(model), TOLERANCE)


@pytest.mark.parametrize("family", ["bamba", "jamba", "qwen3_next"])
def test_a_kernel_without_gradient_is_not_used_where_one_is_needed(family, monkeypatch):
    name = {"bamba": "mamba2_selective_state_update", "jamba": "mamba_selective_state_update"}
    name = name.get(family, "torch_recurrent_gated_delta_rule")
    module = import_module(type(hybrid(family)).__module__)
    function, used = getattr(module, name).__wrapped__, []

    def kernel(*args, **kwargs):
        used.append(torch.is_grad_enabled())
        with torch.no_grad():
            return function(*args, **kwargs)

    kernel.__wrapped__ = function
    monkeypatch.setattr(module, name, kernel)
    system = system_of(family)
    check(system, family)
    assert used and not any(used)
    with torch.no_grad(), in_double():
        output = system(*arguments(*ragged(NAMES, ROWS)))
    assert error(output.logits, expected(family)[1]) <= TOLERANCE


@pytest.mark.parametrize("family", ["qwen3_next", "jamba", "lfm2"])
def test_rows_at_their_own_pace(family):
    system, model = system_of(family).eval(), stock(adapted(family)).get_base_model()
    generator = torch.Generator().manual_seed(3)
    tokens = [torch.randint(0, 37, (6,), generator=generator) for _ in range(3)]
    trace = KVTrace.allocate(batch=3, capacity=6, **system.agent_model.trace_sizes)
    found, at = [[], [], []], [0, 0, 0]
    with torch.no_grad(), in_double():
        for lengths in ([0, 2, 1], [3, 0, 1], [1, 1, 1], [2, 3, 0], [0, 0, 3]):
            ids = torch.cat([row[a : a + n] for row, a, n in zip(tokens, at, lengths, strict=True)])
            hidden = system.agent_model.read(trace, lengths, input_ids=ids).split(lengths)
            for row in range(3):
                found[row].append(hidden[row])
            at = [a + n for a, n in zip(at, lengths, strict=True)]
        for row in range(3):
            alone = read(model, [model.get_input_embeddings()(tokens[row])])
            assert error(torch.cat(found[row]), alone) <= TOLERANCE


def test_a_trajectory_is_let_go_of_without_the_collector():
    system = system_of("qwen3_next", checkpointing="prefill")
    gc.disable()
    try:
        prompts, answers = ragged(NAMES, ROWS)
        ids, lengths = zip(*(packed(rows) for rows in prompts.values()), strict=True)
        state = system.trajectory.communicate(ids, lengths, [len(answer) for answer in answers])
        trace, remembered = weakref.ref(state.trace), [weakref.ref(x) for x in state.trace.states]
        assert len(remembered) == 4
        del state
        assert trace() is None
        assert not [x for x in remembered if x() is not None]
    finally:
        gc.enable()


def written(family="bamba", rows=3):
    system = system_of(family).eval()
    prompts, _ = ragged(NAMES, rows)
    ids, lengths = zip(*(packed(p) for p in prompts.values()), strict=True)
    with torch.no_grad():
        return system.trajectory.communicate(ids, lengths).trace


def test_rows_of_a_trace_take_their_states_along():
    trace = written()
    states = [state.clone() for state in trace.states]
    assert len(states) == 4
    for moved, state in zip(trace.select_rows([2, 0, 0]).states, states, strict=True):
        assert torch.equal(moved, state[[2, 0, 0]])
    for moved, state in zip(mismatched(HandedOver(trace, []), [0] * 3).trace.states, states, strict=True):
        assert torch.equal(moved, state[[1, 2, 0]])
    for drawn, state in zip(noise(HandedOver(written(), []), [1, 2, 3]).trace.states, states, strict=True):
        assert not torch.equal(drawn, state)
        assert torch.allclose(drawn.norm(dim=-1), state.norm(dim=-1))
    assert not any(state.any() for state in zero(HandedOver(trace, []), [0] * 3).trace.states)


def test_states_are_neither_merged_nor_taken_back():
    trace = written()
    with pytest.raises(ValueError, match="recurrent"):
        kv_concat([Segment(trace, [0] * 3, trace.host_lengths)], capacity=99, rotary=None)
    with pytest.raises(ValueError, match="lengths is"):
        trace.rewind([n - 1 for n in trace.host_lengths])


@pytest.mark.parametrize(
    "topology, handover, task",
    [
        ("hierarchical", "full", "merge those agent summarizer receives"),
        ("stitch", "full", "merge those agent"),
        ("sequential", "latent", "leave out the prompts"),
    ],
)
def test_refused_topologies(topology, handover, task):
    with pytest.raises(UnsupportedModelError, match=rf"recurrent layers \(linear_attention\).*{topology}.*{task}"):
        MultiAgentSystem(hybrid("qwen3_next"), load_topology(topology, handover))


def test_refused_backward():
    with pytest.raises(ValueError, match=r"latent_backward is 'sweeps:2'.*recurrent layers \(conv\)"):
        MultiAgentSystem(hybrid("lfm2"), CHAIN, latent_backward="sweeps:2")


def test_reentrant_checkpointing_is_refused():
    system = system_of("bamba")
    system.agent_model.language_model.gradient_checkpointing_enable({"use_reentrant": True})
    output = system(*arguments(*ragged(NAMES, ROWS)))
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        output.loss.backward()


def test_other_recurrent_models_are_refused():
    sizes = dict(vocab_size=37, hidden_size=16, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2)
    minimax = transformers.MiniMaxConfig(
        **sizes, num_hidden_layers=2, layer_types=["linear_attention", "full_attention"], num_local_experts=2,
        head_dim=4,
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match=r"recurrent layers \(linear_attention\) whose state"):
        MultiAgentSystem(transformers.MiniMaxForCausalLM(minimax), CHAIN)
    zamba = transformers.Zamba2Config(
        **sizes, num_hidden_layers=4, layers_block_type=["linear_attention", "hybrid", "linear_attention", "hybrid"],
        mamba_d_state=8, n_mamba_heads=4, num_mem_blocks=1, mamba_ngroups=1,
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match=r"attends more than once in layers"):
        MultiAgentSystem(transformers.Zamba2ForCausalLM(zamba), CHAIN)
    mamba = transformers.MambaConfig(vocab_size=37, hidden_size=16, num_hidden_layers=2)
    with pytest.raises(UnsupportedModelError, match="recurrent layers and no attention"):
        MultiAgentSystem(transformers.MambaForCausalLM(mamba), CHAIN)


def test_a_second_system_on_the_same_model():
    model = hybrid("qwen3_next")
    first, second = (MultiAgentSystem(model, CHAIN, latent_steps=steps) for steps in (1, 2))
    assert first.agent_model.recurrent == second.agent_model.recurrent
    assert first.agent_model.layers is second.agent_model.layers
