"""What a trajectory composes with: alignments, checkpointing, rotary variants, partly frozen models."""

import pytest
import torch
from compare import assert_same, error, gradients
from oracle import batch
from tiny_models import arguments, causal_lm, clone, packed, ragged, with_lora
from transformers import GlmConfig, GlmForCausalLM

from diffmas.agents.topology import TOPOLOGIES, load_topology
from diffmas.models import decoder_layer
from diffmas.models.alignment import Alignment, AlignmentOptions, ridge_alignment
from diffmas.models.geometry import geometry_of
from diffmas.system import MultiAgentSystem
from diffmas_ops import cached_attention

TOLERANCE = 1e-10
pytestmark = pytest.mark.usefixtures("poison")


def dag(topology):
    return {a.name: a.senders for a in topology.agents}


def check(model, *, topology="stitch", handover="full", latent_steps=2, detach=False, weight=None, rows=3, **options):
    """Compare a system on `model` against the oracle and return it; `weight` is the oracle's Wₐ."""
    topology = load_topology(topology, handover)
    system = MultiAgentSystem(model, topology, latent_steps=latent_steps, detach_trace=detach, **options)
    prompts, answers = ragged([a.name for a in topology.agents], rows, longest=9)
    output = system(*arguments(prompts, answers))
    output.loss.backward()
    twin = clone(model)
    twin.zero_grad()
    loss, logits = batch(
        twin, dag(topology), prompts, answers,
        handover=handover, latent_steps=latent_steps, detach=detach, weight=weight,
    )  # fmt: skip
    loss.backward()
    assert error(output.loss, loss) <= TOLERANCE
    assert error(output.logits, logits) <= TOLERANCE
    assert_same(gradients(model), gradients(twin), TOLERANCE)
    return system


def ridge_weight(model, ridge=1e-5):
    w_in = model.get_input_embeddings().weight.detach()
    w_out = model.get_output_embeddings().weight.detach()
    return torch.linalg.inv(w_out.T @ w_out + ridge * torch.eye(w_out.shape[1]).double()) @ w_out.T @ w_in


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("alignment", ["identity", "ridge"])
def test_fixed_alignment(alignment, tied, backend):
    model = with_lora(causal_lm("llama", tied=tied))
    weight = ridge_weight(model.get_base_model()) if alignment == "ridge" and not tied else None
    system = check(model, alignment=alignment, weight=weight, backend=backend)
    assert (system.agent_model.alignment.weight is None) == (weight is None)
    assert not list(system.agent_model.alignment.parameters())


def test_ridge_of_tied_embeddings_is_the_identity_up_to_lambda():
    embedding = torch.randn(200, 16, dtype=torch.float64)
    assert error(ridge_alignment(embedding, embedding), torch.eye(16).double()) < 1e-6


@pytest.mark.parametrize("initial", ["identity", "ridge"])
def test_learned_alignment_starts_where_told(initial, backend):
    model = with_lora(causal_lm("qwen2"))
    weight = torch.eye(16).double() if initial == "identity" else ridge_weight(model.get_base_model())
    weight.requires_grad_()
    system = check(model, alignment="learned", alignment_initial=initial, weight=weight, backend=backend)
    assert error(system.agent_model.alignment.weight.grad, weight.grad) <= TOLERANCE


def test_target_norm_is_the_mean_row_norm_of_the_input_embedding():
    w_in, w_out = torch.randn(7, 4), torch.randn(7, 4)
    alignment = Alignment(w_in, w_out)
    rho = w_in.norm(dim=1).mean()
    assert alignment.target_norm == pytest.approx(float(rho))
    torch.testing.assert_close(alignment(torch.randn(5, 4)).norm(dim=1), rho.expand(5))


def test_a_low_precision_ridge_is_solved_in_float64():
    w_in, w_out = torch.randn(40, 8).bfloat16(), torch.randn(40, 8).bfloat16()
    alignment = Alignment(w_in, w_out, AlignmentOptions("ridge"))
    assert alignment.weight.dtype == torch.bfloat16
    torch.testing.assert_close(alignment.weight, ridge_alignment(w_in.double(), w_out.double()).bfloat16())


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_static_rope_scaling(rope):
    check(with_lora(causal_lm("llama", rope_parameters={"rope_theta": 10000.0} | rope)), topology="hierarchical")


def test_multi_query_attention(backend):
    check(with_lora(causal_lm("llama", num_key_value_heads=1)), backend=backend)


def test_interleaved_partial_rotary_is_recognised():
    torch.manual_seed(0)
    model = GlmForCausalLM(
        GlmConfig(
            vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, partial_rotary_factor=0.5, pad_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip
    rotary = geometry_of(model)[0].rotary
    assert rotary.interleaved and rotary.inv_freq.shape == (2,)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize(
    "targets",
    [["down_proj"], ["o_proj"], ["v_proj"], r".*layers\.1\.self_attn\.k_proj", r".*layers\.0\.mlp\.up_proj"],
)
def test_partly_frozen_models(targets, checkpointing, backend):
    """Calls of which only some tensors, or only later layers, take part in the gradient."""
    model = with_lora(causal_lm("qwen3"), embeddings=False, targets=targets).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # PEFT makes the inputs of a checkpointed model require gradients; here they must not.
        model.get_base_model().disable_input_require_grads()
    for topology in ("sequential", "stitch"):
        model.zero_grad()
        check(model, topology=topology, backend=backend)


def test_everything_trainable(backend):
    check(causal_lm("qwen2").requires_grad_(), topology="hierarchical", backend=backend)


def _count_runs(monkeypatch):
    runs = []

    def counting(*args, **kwargs):
        runs.append(kwargs["layer"])
        return cached_attention(*args, **kwargs)

    def counting_fused(hidden, turns, layer):
        runs.append(layer.index)
        return fused(hidden, turns, layer)

    monkeypatch.setattr("diffmas.models.attention.cached_attention", counting)
    fused = decoder_layer._run
    monkeypatch.setattr(decoder_layer, "_run", counting_fused)
    return runs


def test_checkpointing_runs_every_layer_of_every_call_twice(monkeypatch):
    model = with_lora(causal_lm("qwen3")).train()
    system = MultiAgentSystem(model, TOPOLOGIES["sequential"], latent_steps=2)
    # Construction runs the model too.
    runs = _count_runs(monkeypatch)
    inputs = arguments(*ragged([a.name for a in system.topology.agents], 2))
    system(*inputs).loss.backward()
    plain = len(runs)
    assert plain == 2 * (3 * (1 + 2) + 1)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    system(*inputs).loss.backward()
    assert len(runs) == 3 * plain


@pytest.mark.parametrize("detach", [False, True])
def test_reentrant_checkpointing_raises(detach):
    model = with_lora(causal_lm("qwen3")).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    system = MultiAgentSystem(model, TOPOLOGIES["sequential"], latent_steps=1, detach_trace=detach)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        system(*arguments(*ragged([a.name for a in system.topology.agents], 2))).loss.backward()


def test_reentrant_checkpointing_of_some_layers_raises():
    model = with_lora(causal_lm("qwen3")).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.get_base_model().get_decoder().layers[0].gradient_checkpointing = False
    system = MultiAgentSystem(model, TOPOLOGIES["sequential"], latent_steps=1)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        system(*arguments(*ragged([a.name for a in system.topology.agents], 2))).loss.backward()


def test_loss_is_divided_by_the_number_given():
    model = with_lora(causal_lm("qwen3"))
    system = MultiAgentSystem(model, TOPOLOGIES["relay"], latent_steps=1)
    inputs = arguments(*ragged(["sender", "solver"], 3))
    mean, divided = system(*inputs), system(*inputs, num_items_in_batch=torch.tensor(7))
    torch.testing.assert_close(divided.loss * 7, mean.loss * len(inputs[2]))
    assert mean.logits.shape == (len(inputs[2]), 37)


def test_communicate_without_a_reserve_makes_a_trace_that_grows():
    model = with_lora(causal_lm("qwen3"))
    system = MultiAgentSystem(model, TOPOLOGIES["stitch"], latent_steps=1)
    prompts, answers = ragged([a.name for a in system.topology.agents], 3)
    ids, lengths = zip(*(packed(rows) for rows in prompts.values()), strict=True)
    with torch.no_grad():
        trace = system.trajectory.communicate(ids, lengths).trace
        hidden = [system.agent_model.read(trace, lengths[-1], input_ids=ids[-1])]
        before = trace.capacity
        for _ in range(4):
            hidden.append(system.agent_model.read(trace, 1, input_ids=torch.zeros(3, dtype=torch.int64)))
        assert trace.capacity > before
        # The same tokens in one call over a trace that was large enough from the start.
        rows = [torch.cat((p, torch.zeros(4, dtype=torch.int64))) for p in prompts["solver"]]
        whole = system.trajectory.communicate(ids, lengths, [4] * 3).trace
        together = system.agent_model.read(whole, [len(r) for r in rows], input_ids=torch.cat(rows)).split(
            [len(r) for r in rows]
        )
    assert whole.capacity == max(whole.host_lengths)
    for b, row in enumerate(hidden[0].split(lengths[-1])):
        alone = torch.cat([row, *(h[b : b + 1] for h in hidden[1:])])
        assert error(together[b], alone) <= TOLERANCE
