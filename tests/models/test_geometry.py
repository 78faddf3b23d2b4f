"""A model's attention layers as they are found by running it."""

import copy

import pytest
import torch
import transformers
from tiny_models import arguments, ragged

from diffmas.generation import Decoding
from diffmas.models.errors import UnsupportedModelError
from diffmas.models.geometry import geometry_of
from diffmas.models.rotation import Change
from diffmas.system import MultiAgentSystem

SIZES = dict(
    vocab_size=37, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=2048, pad_token_id=0, eos_token_id=1, bos_token_id=2,
)  # fmt: skip
EXPERTS = dict(n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2, moe_intermediate_size=8)
LATENT = dict(qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, q_lora_rank=8, kv_lora_rank=8, head_dim=4)


def model_of(kind, dtype=torch.float32, **options):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(kind, **SIZES | options), dtype=dtype
    )


class NoText:
    """A tokenizer for answers that nobody reads."""

    eos_token_id = chat_template = None

    def decode(self, tokens, **options):
        return ""


def turns(layer):
    return layer.rotary and (2 * len(layer.rotary.inv_freq), layer.rotary.interleaved, layer.offset)


@pytest.mark.parametrize(
    "kind, options, windows, turned",
    [
        ("llama", {}, [None] * 4, [(8, False, 0)] * 4),
        ("mistral", dict(sliding_window=16), [16] * 4, [(8, False, 0)] * 4),
        ("qwen2", dict(use_sliding_window=True, sliding_window=5, max_window_layers=3), [None, None, None, 5],
         [(8, False, 0)] * 4),
        ("gemma2", dict(sliding_window=16), [16, None] * 2, [(8, False, 0)] * 4),
        ("gpt_oss", dict(sliding_window=9, num_local_experts=4), [9, None] * 2, [(8, False, 0)] * 4),
        ("cohere2", dict(sliding_window=16), [16] * 3 + [None], [(8, True, 0)] * 3 + [None]),
        ("smollm3", {}, [None] * 4, [(8, False, 0)] * 3 + [None]),
        ("glm", dict(partial_rotary_factor=0.5), [None] * 4, [(4, True, 0)] * 4),
        ("stablelm", dict(partial_rotary_factor=0.5), [None] * 4, [(4, False, 0)] * 4),
        ("deepseek_v3", LATENT | EXPERTS, [None] * 4, [(4, False, 8)] * 4),
    ],
)  # fmt: skip
def test_windows_and_rotations(kind, options, windows, turned):
    layers = geometry_of(model_of(kind, **options))
    assert list(layers) == [0, 1, 2, 3] and [g.slot for g in layers.values()] == [0, 1, 2, 3]
    assert [g.window for g in layers.values()] == windows
    assert [turns(g) for g in layers.values()] == turned
    assert not any(g.immovable for g in layers.values())


def test_chunks():
    layers = geometry_of(model_of("llama4_text", attention_chunk_size=16, num_local_experts=2)).values()
    assert [(g.chunk, g.window) for g in layers] == [(16, None)] * 3 + [(None, None)]
    assert [turns(g) for g in layers] == [(8, True, 0)] * 3 + [None]


def test_two_kinds_of_frequencies():
    layers = list(geometry_of(model_of("gemma3_text", sliding_window=16, num_hidden_layers=7)).values())
    assert [g.window for g in layers] == [16] * 5 + [None, 16]
    near, far = layers[0].rotary.inv_freq, layers[5].rotary.inv_freq
    assert torch.equal(layers[6].rotary.inv_freq, near) and not torch.allclose(near, far)


def test_values_smaller_than_keys():
    layer = geometry_of(model_of("deepseek_v3", **LATENT, **EXPERTS))[0]
    assert (layer.num_kv_heads, layer.head_dim, layer.value_dim) == (4, 12, 8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    layers = geometry_of(model_of("smollm3", dtype)).values()
    assert [turns(g) for g in layers] == [(8, False, 0)] * 3 + [None]


def test_the_model_is_left_as_it_was():
    model = model_of("qwen3").train()
    model.model.layers[0].eval()
    before = {name: p.clone() for name, p in model.named_parameters()}
    modes = [m.training for m in model.modules()]
    geometry_of(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert [m.training for m in model.modules()] == modes and model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "kind, options, why",
    [
        ("hunyuan_v1_dense", {}, "no rotation explains how keys change"),
        ("gpt2", dict(n_embd=32, n_head=4, n_layer=2, n_positions=64), "no rotation explains how keys change"),
        (
            "phi3",
            dict(
                original_max_position_embeddings=32,
                rope_parameters=dict(
                    rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[2.0] * 4,
                    original_max_position_embeddings=32,
                ),
            ),
            "frequencies change with the length .rope_type 'longrope'",
        ),
        (
            "llama",
            dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)),
            "frequencies change with the length .rope_type 'dynamic'",
        ),
    ],
)  # fmt: skip
def test_keys_that_cannot_be_moved(kind, options, why):
    """They serve where nothing moves, and are refused by name where something does."""
    model = model_of(kind, **options)
    for topology in ("hierarchical", "stitch", "relay"):
        with pytest.raises(UnsupportedModelError, match=f"keys cannot be moved, in layer 0: {why}.*'{topology}'"):
            MultiAgentSystem(model, topology, latent_steps=1)
    system = MultiAgentSystem(model, "sequential", latent_steps=1)
    prompts, answers = ragged([a.name for a in system.topology.agents], 2, longest=5)
    assert system(*arguments(prompts, answers)).loss.isfinite()


def longrope(dtype=torch.float32):
    """Other frequencies from position 16 on."""
    rope = dict(
        rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[2.0] * 4,
        original_max_position_embeddings=16,
    )  # fmt: skip
    return model_of("phi3", dtype, original_max_position_embeddings=16, rope_parameters=rope)


def test_rows_on_both_sides_of_other_frequencies():
    system = MultiAgentSystem(longrope(), "single", latent_steps=1)

    def loss(*lengths):
        prompts = [torch.arange(n) % 37 for n in lengths]
        return system(*arguments({"single": prompts}, [torch.tensor([3])] * len(lengths))).loss

    assert loss(4, 15).isfinite() and loss(20, 30).isfinite()
    with pytest.raises(UnsupportedModelError, match=r"rows on both sides of position 16, .*\[5, 21\]"):
        loss(4, 20)


@pytest.mark.parametrize("samples", [1, 2])
def test_answers_that_would_go_on_with_other_frequencies(samples):
    """A trace is written with the frequencies of its length; what goes beyond with others is refused, not mixed."""
    model = longrope(torch.float64)
    system = MultiAgentSystem(model, "single", latent_steps=0).eval()
    decoding = Decoding(max_new_tokens=4, temperature=0, samples=samples)

    def answered(length):
        (found,) = system.generate([torch.arange(length) % 37], [[length]], NoText(), decoding)
        return found

    with pytest.raises(UnsupportedModelError, match=r"goes beyond position 16, .*longrope.*keys from before it"):
        answered(15)
    stock = copy.deepcopy(model)
    stock.set_attn_implementation("eager")
    for length in (12, 17):
        ids = torch.arange(length) % 37
        with torch.no_grad():
            for _ in range(4):
                ids = torch.cat((ids, stock(input_ids=ids[None], use_cache=False).logits[0, -1:].argmax(-1)))
        assert all(completion.tokens == ids[length:].tolist() for completion in answered(length))


def test_agents_that_would_go_on_with_other_frequencies():
    system = MultiAgentSystem(longrope(), "sequential", latent_steps=1)
    names = [agent.name for agent in system.topology.agents]

    def loss(*lengths):
        prompts = {name: [torch.arange(n) % 37] for name, n in zip(names, lengths, strict=True)}
        return system(*arguments(prompts, [torch.tensor([3])])).loss

    assert loss(2, 2, 2, 2).isfinite() and loss(17, 2, 2, 2).isfinite()
    with pytest.raises(UnsupportedModelError, match=r"goes beyond position 16, .*rows end at \[18\].*\[12\] of them"):
        loss(5, 5, 6, 2)


def test_attention_twice_a_layer_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"attends more than once in layers \[0, 1, 2, 3\]"):
        geometry_of(model_of("diffllama"))


@pytest.mark.parametrize("checkpointing", ["none", "all"])
def test_layers_that_keep_their_keywords(checkpointing):
    """Their attention finds the call in what its layer was given, also when checkpointing runs the layer again."""
    system = MultiAgentSystem(
        model_of("stablelm", torch.float64), "stitch", latent_steps=2, checkpointing=checkpointing
    )
    prompts, answers = ragged([a.name for a in system.topology.agents], 3)
    output = system.train()(*arguments(prompts, answers))
    output.loss.backward()
    alone = []
    for row in range(3):
        own = arguments({name: [rows[row]] for name, rows in prompts.items()}, [answers[row]])
        alone.append(system(*own).loss * len(answers[row]))
    torch.testing.assert_close(output.loss, sum(alone) / sum(map(len, answers)), rtol=1e-9, atol=0)
    assert all(p.grad is None or p.grad.isfinite().all() for p in system.parameters())
    assert system.agent_model.language_model.model.layers[0].self_attn.k_proj.weight.grad.norm() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_frequencies_that_change_show_in_every_dtype(kind, dtype):
    """As they do on real models: by little, between many positions, in 16 bits."""
    sizes = dict(SIZES, max_position_embeddings=64) if kind == "dynamic" else dict(SIZES, max_position_embeddings=256)
    rope = dict(rope_type=kind, rope_theta=1e4, factor=2.0)
    if kind == "longrope":
        factors = [1.0 + 0.1 * i for i in range(4)]
        rope |= dict(short_factor=[1.0] * 4, long_factor=factors, original_max_position_embeddings=64)
    config = transformers.LlamaConfig(**sizes, rope_parameters=rope)
    layers = geometry_of(transformers.LlamaForCausalLM(config).to(dtype)).values()
    assert {layer.changes for layer in layers} == {Change(kind, 64, kind == "longrope")}
    assert all(layer.immovable for layer in layers)
