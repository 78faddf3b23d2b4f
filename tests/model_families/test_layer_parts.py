"""Families whose layers run as one operation, each against its own modules: what layers are made of, and windows."""

import contextlib
import copy

import pytest
import torch
import transformers
from compare import assert_same, error, gradients
from tiny_models import arguments, ragged, with_lora

from benchmarks.models.precision import widened
from diffmas.agents.topology import TOPOLOGIES
from diffmas.models import decoder_layer
from diffmas.system import MultiAgentSystem
from diffmas_ops import library

pytestmark = pytest.mark.skipif(library.failure("cpu") is not None, reason=str(library.failure("cpu")))

SIZES = dict(
    vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=512, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    initializer_range=0.3, attention_dropout=0.0,
)  # fmt: skip
#: A layer with a window shorter than any prefix beside one that sees everything.
WINDOWS = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=3)
FAMILIES = {
    "gemma": {},
    "gemma2": WINDOWS | dict(attn_logit_softcapping=2.0, query_pre_attn_scalar=5),
    "gemma3_text": WINDOWS | dict(query_pre_attn_scalar=5),
    "llama": dict(mlp_bias=True),
    "mistral": dict(sliding_window=3),
    "ministral": WINDOWS,
    "granite": dict(residual_multiplier=0.3, attention_multiplier=0.2, embedding_multiplier=3.0, logits_scaling=2.0),
    "olmo2": {},
    "olmo3": WINDOWS,
    "qwen2": WINDOWS | dict(use_sliding_window=True),
    "qwen3": WINDOWS | dict(use_sliding_window=True),
    "smollm3": dict(no_rope_layers=[1, 0]),
}


def model_of(kind, dtype=torch.float64, **options):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES | FAMILIES[kind] | options)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
    return with_lora(model)


def run(model, prompts, answers, fused=True, checkpointing=False, **options):
    """Loss, logits, gradients, and how many layers' calls were one operation."""
    runs, operation = [], decoder_layer._run
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        if model.dtype == torch.float64:
            stack.enter_context(widened())
        patch.setattr(decoder_layer, "_run", lambda *args: runs.append(1) or operation(*args))
        if not fused:
            patch.setattr(decoder_layer, "_plain", lambda *args: None)
        model = copy.deepcopy(model).train()
        system = MultiAgentSystem(model, TOPOLOGIES["sequential"], latent_steps=2, **options)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        runs.clear()
        output = system(*arguments(prompts, answers), num_items_in_batch=torch.tensor(1))
        output.loss.backward()
    return output.loss.detach(), output.logits.detach(), gradients(model), len(runs)


def batch(rows):
    return ragged([agent.name for agent in TOPOLOGIES["sequential"].agents], rows)


def assert_equal(found, expected, tolerance):
    assert error(found[0], expected[0]) <= tolerance and error(found[1], expected[1]) <= tolerance
    assert_same(found[2], expected[2], tolerance)


@pytest.mark.parametrize("detach", [False, True], ids=["", "detached"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_equals_the_layers_own_modules(kind, detach):
    model, rows = model_of(kind), batch(7)
    expected = run(model, *rows, fused=False, detach_trace=detach)
    found = run(model, *rows, detach_trace=detach)
    again = run(model, *rows, detach_trace=detach, checkpointing=True)
    # Two layers' calls of three agents with two latent steps each and a last one, and of those again that owe anything.
    calls, owing = 2 * (3 * (1 + 2) + 1), 2 if detach else 2 * (3 * (1 + 2) + 1)
    assert (expected[3], found[3], again[3]) == (0, calls, calls + owing)
    for result in (found, again):
        assert_equal(result, expected, 1e-12)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_batch_is_its_rows(kind):
    model, (prompts, answers) = model_of(kind), batch(3)
    whole = run(model, prompts, answers)
    rows = [run(model, {n: p[i : i + 1] for n, p in prompts.items()}, answers[i : i + 1]) for i in range(3)]
    grads = {name: sum(row[2][name] for row in rows) for name in rows[0][2]}
    assert_equal(whole, (sum(row[0] for row in rows), torch.cat([row[1] for row in rows]), grads), 1e-12)


@pytest.mark.parametrize("kind", FAMILIES)
def test_float32_is_as_close_as_the_layers_own_modules(kind):
    model, rows = model_of(kind, torch.float32), batch(3)
    exact = run(copy.deepcopy(model).double(), *rows)
    errors = []
    for fused in (True, False):
        _, logits, grads, _ = run(model, *rows, fused=fused)
        flat, wanted = (torch.cat([g[name].flatten() for name in exact[2]]) for g in (grads, exact[2]))
        errors.append((error(logits, exact[1]), error(flat, wanted)))
    (logits, grads), (own_logits, own_grads) = errors
    assert logits <= 2 * own_logits and grads <= 3 * own_grads


def test_an_activation_that_no_gate_is_stays_with_the_layers_modules():
    assert run(model_of("llama", hidden_act="relu"), *batch(2))[3] == 0


@pytest.mark.parametrize(
    "kind, change",
    [
        ("granite", lambda layer: setattr(layer, "residual_multiplier", 0.7)),
        ("gemma2", lambda layer: setattr(layer.self_attn, "attn_logit_softcapping", 0.4)),
        ("gemma", lambda layer: setattr(layer.mlp, "act_fn", torch.nn.SiLU())),
    ],
    ids=["scale", "cap", "activation"],
)
def test_what_has_changed_since_the_last_call_is_seen(kind, change):
    rows = arguments(*batch(2))
    with widened():
        used, fresh = (model_of(kind) for _ in range(2))
        system = MultiAgentSystem(used, TOPOLOGIES["sequential"], latent_steps=1)
        before = system(*rows).loss
        for model in (used, fresh):
            change(model.get_base_model().get_decoder().layers[0])
        after = system(*rows).loss
        wanted = MultiAgentSystem(fresh, TOPOLOGIES["sequential"], latent_steps=1)(*rows).loss
    assert error(after, before) > 1e-6 and torch.equal(after, wanted)
