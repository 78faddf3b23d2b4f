"""What an inspection reports is what a plain transformers model with eager attention computes."""

import copy

import pytest
import torch
import transformers
from tiny_models import VOCAB, causal_lm, clone, packed, ragged
from transformers import DynamicCache

from diffmas.agents.topology import load_topology
from diffmas.conversation.terminal import _parts_table
from diffmas.evaluation.inspection import inspect
from diffmas.models.attention_masses import AttentionMasses
from diffmas.system import MultiAgentSystem
from diffmas_ops import KVTrace, cached_attention

M = 3


@torch.no_grad()
def by_hand(model, prompts, tokens):
    """Per layer the attention to every column, and the hidden states latent steps are made of, by agent."""
    cache = DynamicCache()
    rho = model.get_input_embeddings().weight.norm(dim=1).mean()
    states = {}
    for name in list(prompts)[:-1]:
        hidden = model.model(input_ids=prompts[name][0][None], past_key_values=cache).last_hidden_state[0, -1]
        states[name] = [hidden]
        for _ in range(M):
            embeds = (rho * hidden / hidden.norm())[None, None]
            hidden = model.model(inputs_embeds=embeds, past_key_values=cache).last_hidden_state[0, -1]
            states[name].append(hidden)
    ids = torch.cat((list(prompts.values())[-1][0], torch.tensor(tokens[:-1], dtype=torch.long)))
    attentions = model.model(input_ids=ids[None], past_key_values=cache, output_attentions=True).attentions
    return torch.stack([a[0, :, -max(1, len(tokens)) :].mean((0, 1)) for a in attentions]), states


@pytest.mark.parametrize("tokens", [[3, 5, 7, 2], [4], []])
@pytest.mark.parametrize("topology", ["sequential", "single"])
def test_against_eager_attention(topology, tokens):
    model = causal_lm("qwen3").eval()
    twin = clone(model)
    twin.set_attn_implementation("eager")
    system = MultiAgentSystem(model, load_topology(topology), latent_steps=M).train()
    prompts, _ = ragged([a.name for a in system.topology.agents], 1)
    ids, lengths = zip(*(packed(rows) for rows in prompts.values()), strict=True)
    found = inspect(system, ids, lengths, tokens, top=2)
    assert system.training

    attention, states = by_hand(twin, prompts, tokens)
    at = 0
    for part in found.parts:
        expected = attention[:, at : at + part.columns].sum(1)
        # transformers' eager attention takes the softmax in float32.
        assert part.layers == pytest.approx(expected.tolist(), abs=1e-6)
        assert part.mass == pytest.approx(float(expected.mean()), abs=1e-6)
        at += part.columns
    assert at == attention.shape[1] and sum(p.mass for p in found.parts) == pytest.approx(1, abs=1e-10)
    names = list(prompts)
    kinds = [(n, kind) for n in names[:-1] for kind in ("prompt", "latent steps")] + [(names[-1], "prompt")]
    kinds += [(names[-1], "answer")] if len(tokens) > 1 else []
    assert [(p.agent, p.kind) for p in found.parts] == kinds
    assert [p.columns for p in found.parts if p.kind == "latent steps"] == [M] * (len(names) - 1)

    assert [(s.agent, s.step) for s in found.steps] == [(n, t) for n in names[:-1] for t in range(1, M + 1)]
    embedding = twin.get_input_embeddings().weight.detach()
    for step in found.steps:
        hidden = states[step.agent][step.step - 1]
        said = twin.lm_head(hidden).softmax(-1)
        cosine = torch.cosine_similarity(hidden[None], embedding)
        for pairs, values in ((step.said, said), (step.nearest, cosine)):
            assert [token for token, _ in pairs] == values.topk(2).indices.tolist()
            assert [value for _, value in pairs] == pytest.approx(values.topk(2).values.tolist(), abs=1e-5)


def test_what_goes_to_sinks_is_a_share_of_its_own():
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1, max_position_embeddings=512,
        sliding_window=512, initializer_range=0.3, rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    )  # fmt: skip
    model = transformers.GptOssForCausalLM(config).double().eval()
    model.config._experts_implementation = "eager"
    for n, layer in enumerate(model.model.layers):
        layer.self_attn.sinks.data.copy_(torch.tensor([0.5, -1, 2, n]))
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    system = MultiAgentSystem(model, load_topology("sequential"), latent_steps=M)
    prompts, _ = ragged([a.name for a in system.topology.agents], 1)
    ids, lengths = zip(*(packed(rows) for rows in prompts.values()), strict=True)
    found = inspect(system, ids, lengths, [3, 5, 7])
    # What transformers leaves out of a query's probabilities is the sink's.
    attention, _ = by_hand(twin, prompts, [3, 5, 7])
    *parts, sink = found.parts
    at = 0
    for part in parts:
        assert part.layers == pytest.approx(attention[:, at : at + part.columns].sum(1).tolist(), abs=1e-6)
        at += part.columns
    assert at == attention.shape[1] and (sink.agent, sink.kind, sink.columns) == ("", "sink", 0)
    assert sink.layers == pytest.approx((1 - attention.sum(1)).tolist(), abs=1e-6) and min(sink.layers) > 0.05
    assert sum(p.mass for p in found.parts) == pytest.approx(1, abs=1e-10)
    kinds, shares = (list(_parts_table(found).columns[n].cells) for n in (1, 3))
    assert kinds[-1] == "sink" and shares[-1] == f"{sink.mass:.1%}"


def test_latent_hand_over_has_no_prompt_parts():
    system = MultiAgentSystem(causal_lm("llama"), load_topology("stitch", "latent"), latent_steps=M)
    prompts, _ = ragged([a.name for a in system.topology.agents], 1)
    ids, lengths = zip(*(packed(rows) for rows in prompts.values()), strict=True)
    found = inspect(system, ids, lengths, [1, 2])
    *senders, solver, answer = found.parts
    assert [(p.agent, p.kind, p.columns) for p in senders] == [
        (n, "latent steps", M) for n in ("planner", "critic", "refiner")
    ]
    assert (solver.agent, solver.columns, answer.columns) == ("solver", lengths[-1][0], 1)
    assert sum(p.mass for p in found.parts) == pytest.approx(1)
    assert len(found.steps) == 3 * M


def test_one_row_only():
    system = MultiAgentSystem(causal_lm("qwen3"), load_topology("single"))
    with pytest.raises(ValueError, match="prompt_lengths has 2 rows; allowed: 1"):
        inspect(system, [torch.arange(VOCAB)[:4]], [[2, 2]], [1])


@pytest.mark.parametrize("scores", [dict(window=4), dict(chunk=6), dict(softcap=0.5, window=9, chunk=5)], ids=str)
def test_masses_of_other_scores(scores):
    """What the last queries pay, with the probabilities written out query by query."""
    torch.manual_seed(0)
    trace = KVTrace.allocate(num_layers=1, batch=1, num_kv_heads=2, capacity=20, head_dim=4, dtype=torch.float64)
    k, v = torch.randn(2, 20, 2, 4, dtype=torch.float64)
    q = torch.randn(20, 4, 4, dtype=torch.float64)
    cached_attention(q[:8], k[:8], v[:8], trace.open(8), layer=0)
    call = trace.open(12)
    call.attend = AttentionMasses(call, 3)
    cached_attention(q[8:], k[8:], v[8:], call, layer=0, **scores)
    paid = torch.zeros(20, dtype=torch.float64)
    for position in (17, 18, 19):
        first = max(position + 1 - scores.get("window", 20), position - position % scores.get("chunk", 20), 0)
        seen = range(first, position + 1)
        for head in range(4):
            made = torch.stack([q[position, head] @ k[j, head // 2] / 2 for j in seen])
            if cap := scores.get("softcap"):
                made = cap * torch.tanh(made / cap)
            paid[first : position + 1] += made.softmax(0) / 12
    masses, _ = call.attend.mean()
    assert torch.allclose(masses[0], paid, rtol=0, atol=1e-12)
