"""Families whose models scale or cap logits, scale embeddings, or drop: against their own forward, row by row."""

import copy
import warnings

import pytest
import torch
import transformers
from compare import assert_same, error, gradients
from oracle import DEFAULT_LIMIT, Soft, batch, entering
from peft import LoraConfig, get_peft_model
from tiny_models import arguments, causal_lm, clone, packed, ragged, with_lora

from diffmas.agents.topology import Agent, Topology
from diffmas.embedded.tokenizer import build_tokenizer
from diffmas.generation import Decoding
from diffmas.models.dropout import Silenced, silence
from diffmas.models.embedding import input_vectors
from diffmas.models.errors import UnsupportedModelError
from diffmas.models.head import head_of
from diffmas.system import MultiAgentSystem

TOLERANCE = 1e-10
DAG = {"planner": (), "critic": ("planner",), "solver": ("critic",)}
SIZES = dict(
    vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, pad_token_id=0, eos_token_id=1, bos_token_id=2, initializer_range=0.3,
)  # fmt: skip
FULL = {"layer_types": ["full_attention"] * 2}
#: Name, options, and what in the logits differs from those of a linear layer.
FAMILIES = {
    "cohere": ("Cohere", dict(logit_scale=0.0625, use_qk_norm=False)),
    "granite": (
        "Granite",
        dict(logits_scaling=6.0, embedding_multiplier=12.0, attention_multiplier=0.2, residual_multiplier=0.22),
    ),
    "granite_untied": ("Granite", dict(logits_scaling=3.0, embedding_multiplier=0.5, tie_word_embeddings=False)),
    "gemma": ("Gemma", {}),
    "gemma2": ("Gemma2", FULL | dict(final_logit_softcapping=1.5, attn_logit_softcapping=None)),
    "olmo": ("Olmo", dict(clip_qkv=0.4)),
}


def model_of(family, **overrides):
    name, options = FAMILIES[family]
    torch.manual_seed(0)
    config, kind = (getattr(transformers, name + end) for end in ("Config", "ForCausalLM"))
    model = kind(config(**SIZES | options | overrides)).double().eval()
    # Gemma 2 has an eager attention only, for the cap that is taken away here; its softmax is in float32.
    model._supports_sdpa = True
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


@pytest.fixture
def wide(monkeypatch):
    """What transformers computes in float32, whatever the model's dtype, stays in float64."""
    to, as_float = torch.Tensor.to, torch.Tensor.float

    def stays(tensor, args, kwargs):
        return tensor.dtype == torch.float64 and torch.float32 in (*args[:1], kwargs.get("dtype"))

    monkeypatch.setattr(torch.Tensor, "to", lambda x, *a, **k: x if stays(x, a, k) else to(x, *a, **k))
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else as_float(x))


def system_of(model, **options):
    topology = Topology("chain", tuple(Agent(*item) for item in DAG.items()), "full")
    return MultiAgentSystem(model, topology, **dict(latent_steps=2) | options)


def ridge_weight(model, ridge=1e-5):
    tokens = torch.arange(SIZES["vocab_size"])[None]
    w_in, w_out = entering(model.get_decoder(), input_ids=tokens), model.get_output_embeddings().weight.detach()
    return torch.linalg.inv(w_out.T @ w_out + ridge * torch.eye(16).double()) @ w_out.T @ w_in


@pytest.mark.parametrize("alignment", ["identity", "ridge", "soft"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_models_own_forward(family, alignment, wide):
    model = with_lora(model_of(family))
    base = model.get_base_model()
    untied = base.get_input_embeddings().weight is not base.get_output_embeddings().weight
    weight = ridge_weight(clone(base)) if alignment == "ridge" and untied else None
    prompts, answers = ragged(list(DAG), 3)
    twin = clone(model)
    loss, logits = batch(
        twin, DAG, prompts, answers, handover="full", latent_steps=2, weight=weight,
        soft=Soft(limit=DEFAULT_LIMIT) if alignment == "soft" else None,
    )  # fmt: skip
    loss.backward()
    system = system_of(model, alignment=alignment)
    assert alignment == "soft" or (system.agent_model.alignment.weight is None) == (weight is None)
    output = system(*arguments(prompts, answers))
    output.loss.backward()
    assert error(output.loss, loss) <= TOLERANCE and error(output.logits, logits) <= TOLERANCE
    assert_same(gradients(model), gradients(twin), TOLERANCE)
    chunked = system_of(copy.deepcopy(twin), alignment=alignment, loss="chunked")
    chunked.zero_grad()
    output = chunked(*arguments(prompts, answers), return_logits=False)
    output.loss.backward()
    assert error(output.loss, loss) <= TOLERANCE
    assert_same(gradients(chunked.agent_model.model), gradients(twin), TOLERANCE)


@pytest.mark.parametrize("family", ["cohere", "granite", "gemma2"])
def test_the_first_token_generated_is_that_of_the_models_own_logits(family, wide):
    """Not only which, but how likely: a scale or a cap leaves the order as it is."""
    model = model_of(family)
    prompts, answers = ragged(list(DAG), 3)
    ids, lengths = zip(*(packed(rows) for rows in prompts.values()), strict=True)
    twin, decoding = clone(model), Decoding(max_new_tokens=1, temperature=0.0)
    found = system_of(model).generate(list(ids), list(lengths), build_tokenizer(), decoding)
    _, logits = batch(twin, DAG, prompts, [a[:1] for a in answers], handover="full", latent_steps=2)
    for (completion,), row in zip(found, logits, strict=True):
        assert completion.tokens == [int(row.argmax())]
        assert completion.logprobs[0] == pytest.approx(float(row.log_softmax(-1).max()), rel=1e-6)


def test_every_scale_and_cap_is_found():
    for family, expected in (("cohere", (0.0625, None)), ("granite", (1 / 6, None)), ("gemma2", (1.0, 1.5))):
        head = system_of(model_of(family)).agent_model.head
        assert (head.scale, head.cap) == expected
    config = transformers.MiniCPM3Config(**SIZES | dict(dim_model_base=4, scale_emb=12))
    assert head_of(transformers.MiniCPM3ForCausalLM(config)).scale == 0.25


def test_what_the_configuration_names_and_the_model_does_not_use_is_not_used():
    config = transformers.LlamaConfig(**SIZES | dict(logit_scale=3.0, final_logit_softcapping=2.0))
    head = head_of(transformers.LlamaForCausalLM(config))
    assert (head.scale, head.cap) == (1.0, None)


@pytest.mark.parametrize("change", [lambda z: z + z.sign(), lambda z: 1.02 * z, lambda z: 900 * (z / 900).tanh()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_that_no_scale_and_cap_explain_are_refused(change, dtype, monkeypatch):
    kind = transformers.LlamaForCausalLM
    own = kind.forward

    def forward(self, *args, **kwargs):
        output = own(self, *args, **kwargs)
        return output.__class__(logits=change(output.logits))

    monkeypatch.setattr(kind, "forward", forward)
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM changes its head's logits .*logit_scale, "):
        system_of(kind(transformers.LlamaConfig(**SIZES)).to(dtype))


def test_inputs_enter_as_large_as_tokens():
    for family, rho in (("granite", 1.0), ("gemma", 4.0)):
        model = model_of(family, **({"embedding_multiplier": 12.0} if family == "granite" else {}))
        weight, decoder = model.get_input_embeddings().weight.detach(), clone(model).get_decoder()
        alignment = system_of(model).agent_model.alignment
        # Granite scales embeddings in its forward, latent inputs among them; Gemma in its embedding module.
        assert alignment.target_norm == pytest.approx(rho * float(weight.norm(dim=1).mean()), rel=1e-6)
        latent = alignment(torch.randn(5, 16, dtype=torch.float64))
        tokens = entering(decoder, input_ids=torch.arange(37)[None]).norm(dim=1).mean()
        entered = entering(decoder, inputs_embeds=latent[None]).norm(dim=1)
        torch.testing.assert_close(entered, tokens.expand(5), rtol=1e-6, atol=0)


def test_layers_that_get_more_of_a_token_than_its_embedding_are_refused():
    config = transformers.Gemma3nTextConfig(
        **SIZES | dict(layer_types=FULL["layer_types"], num_kv_shared_layers=0, vocab_size_per_layer_input=37),
        hidden_size_per_layer_input=4, laurel_rank=2, activation_sparsity_pattern=[0.0, 0.0],
    )  # fmt: skip
    model = transformers.Gemma3nForCausalLM(config)
    with pytest.raises(UnsupportedModelError, match="something else of a token than of its embedding"):
        input_vectors(model)


def test_embeddings_that_only_tokens_have_are_refused():
    class Counting(transformers.LlamaModel):
        def forward(self, input_ids=None, inputs_embeds=None, **kwargs):
            if inputs_embeds is not None:
                raise ValueError("tokens only")
            return super().forward(input_ids=input_ids, **kwargs)

    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    model.model = Counting(model.config)
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM does not take inputs_embeds .*tokens only"):
        system_of(model)


DROPPING = {
    "attention_dropout": ("Llama", dict(attention_dropout=0.3)),
    "hidden_dropout": ("Doge", dict(hidden_dropout=0.3)),
    "router_jitter_noise": (
        "Mixtral", dict(router_jitter_noise=0.3, num_local_experts=2, sliding_window=None, attention_dropout=0.2),
    ),
    "residual_dropout": ("Starcoder2", dict(residual_dropout=0.4, embedding_dropout=0.3, sliding_window=None)),
    "resid_pdrop": ("Phi", dict(resid_pdrop=0.2, embd_pdrop=0.1)),
}  # fmt: skip


@pytest.mark.parametrize("name", DROPPING)
def test_dropout_and_jitter_are_set_to_zero(name):
    family, options = DROPPING[name]
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**SIZES | options))
    model.eval()
    ids = torch.arange(12)[None]
    before = model(ids).logits
    assert silence(model) == {n: v for n, v in options.items() if "drop" in n or "jitter" in n}
    assert silence(model) == {}
    assert torch.equal(model(ids).logits, before)
    model.train()
    torch.testing.assert_close(model(ids).logits, before)
    torch.testing.assert_close(model(ids).logits, before)


def test_dropout_of_the_adapter_stays_and_a_module_of_the_base_is_named():
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    model.model.layers[1].mlp.down_proj = torch.nn.Sequential(torch.nn.Linear(24, 16), torch.nn.Dropout(0.3))
    lora = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.2)
    adapted = get_peft_model(model, lora)
    assert silence(model) == {"model.layers.1.mlp.down_proj.1.p": 0.3}
    assert {m.p for m in adapted.modules() if isinstance(m, torch.nn.Dropout)} == {0.0, 0.2}


def test_training_says_once_what_it_goes_without_and_evaluation_nothing():
    model = with_lora(causal_lm("qwen3", attention_dropout=0.1)).eval()
    system = system_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        system.eval()
    with pytest.warns(Silenced, match=r"the model has attention_dropout = 0.1; training takes 0 for each"):
        system.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        system.eval()
        system.train()
    prompts, answers = ragged(list(DAG), 3)
    loss, _ = batch(clone(model), DAG, prompts, answers, handover="full", latent_steps=2)
    assert error(system(*arguments(prompts, answers)).loss, loss) <= TOLERANCE
