"""Bad input names the argument; models a trace cannot express are refused by name."""

import pytest
import torch
import transformers
from tiny_models import arguments, causal_lm, packed, ragged, with_lora

from diffmas.agents.topology import TOPOLOGIES
from diffmas.models.alignment import AlignmentOptions
from diffmas.models.attention import UnsupportedModelError, attach, trace_attention
from diffmas.system import MultiAgentSystem
from diffmas_ops import KVTrace, UnsupportedError

SIZES = dict(
    vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, pad_token_id=0, eos_token_id=1, bos_token_id=2,
)  # fmt: skip


def model_of(name, **options):
    config = getattr(transformers, f"{name}Config")(**SIZES | options)
    return getattr(transformers, f"{name}ForCausalLM")(config)


def falcon(**options):
    config = transformers.FalconConfig(
        vocab_size=37, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, **options
    )
    return transformers.FalconForCausalLM(config)


def system(**options):
    return MultiAgentSystem(causal_lm("qwen3"), TOPOLOGIES["relay"], **dict(latent_steps=1) | options)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: falcon(alibi=True), r"ALiBi positions \(alibi\)"),
        (lambda: model_of("Mpt", d_model=16, n_heads=2, n_layers=1), r"ALiBi positions \(alibi\)"),
        (lambda: model_of("Bloom"), r"ALiBi positions \(alibi\)"),
        (lambda: model_of("GPTJ", rotary_dim=4), "does not use transformers' attention interface"),
    ],
)  # fmt: skip
def test_attention_a_trace_cannot_express(build, message):
    model = build()
    with pytest.raises(UnsupportedModelError, match=f"model {type(model).__name__} .*{message}"):
        attach(model)


def test_an_encoder_decoder_is_refused():
    sizes = dict(d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
    config = transformers.BartConfig(vocab_size=37, encoder_ffn_dim=8, decoder_ffn_dim=8, **sizes)
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        attach(transformers.BartForConditionalGeneration(config))


@pytest.mark.parametrize("found", [NotImplementedError("no such thing"), None])
def test_a_model_that_names_no_input_embedding(found, monkeypatch):
    def look(self):
        if found is None:
            return None
        raise found

    model = causal_lm("qwen3")
    monkeypatch.setattr(type(model), "get_input_embeddings", look)
    with pytest.raises(UnsupportedModelError, match="model Qwen3ForCausalLM names no input embedding"):
        MultiAgentSystem(model, TOPOLOGIES["relay"], latent_steps=1)


def test_an_attached_model_outside_a_system_says_why_it_stops():
    model = causal_lm("qwen3")
    attach(model)
    with pytest.raises(ValueError, match="trace_call is None"):
        model(torch.tensor([[1, 2]]))


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(attention_mask=torch.ones(1)), ValueError, "attention_mask is given"),
        (dict(dropout=0.1), ValueError, "attention dropout is 0.1"),
    ],
)
def test_what_a_layer_may_not_ask_for(options, error, message):
    trace = KVTrace.allocate(num_layers=1, batch=1, num_kv_heads=1, capacity=2, head_dim=2)
    x = torch.randn(1, 1, 1, 2)
    options = dict(attention_mask=None, trace_call=trace.open(1), trace_layers={}) | options
    with pytest.raises(error, match=message):
        trace_attention(torch.nn.Identity(), x, x, x, **options)


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(latent_steps=-1), ValueError, "latent_steps is -1; allowed: integers ≥ 0"),
        (dict(latent_steps=1.5), TypeError, "integer"),
        (
            dict(alignment="procrustes"),
            ValueError,
            "alignment is 'procrustes'; allowed: identity, ridge, learned, soft",
        ),
        (dict(alignment_temperature=0.0), ValueError, "alignment_temperature is 0.0; allowed: above 0"),
        (dict(alignment_top_k=-1), ValueError, "alignment_top_k is -1; allowed: integers ≥ 0"),
        (dict(alignment="soft", alignment_top_k=99), ValueError, "alignment_top_k is 99; allowed: up to 37"),
        (dict(latent_grad_clip=-1.0), ValueError, "latent_grad_clip is -1.0; allowed: 0"),
        (dict(alignment_initial="learned"), ValueError, "alignment_initial is 'learned'; allowed: identity, ridge"),
    ],
)
def test_system_options(options, error, message):
    with pytest.raises(error, match=message):
        system(**options)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda i: i[0].pop(), "prompt_ids has 1 and prompt_lengths 2 entries; allowed: one per agent .sender, solver"),
        (lambda i: i[1].pop(), "prompt_ids has 2 and prompt_lengths 1 entries"),
        (lambda i: i[1].__setitem__(0, [0, *i[1][0][1:]]), "prompt_lengths of agent sender is .*lengths ≥ 1"),
        (lambda i: i[1].__setitem__(1, i[1][1][:-1]), "prompt_lengths of agent solver is .*3 lengths"),
        (lambda i: i[1].__setitem__(1, [n + 1 for n in i[1][1]]), "prompt_lengths of agent solver"),
        (lambda i: i.__setitem__(3, [0, *i[3][1:]]), "answer_lengths is .*3 lengths ≥ 1"),
        (lambda i: i.__setitem__(3, i[3][:-1]), "answer_lengths is .*3 lengths ≥ 1"),
        (lambda i: i.__setitem__(3, [n + 1 for n in i[3]]), "answer_lengths .* sum to the number of tokens"),
    ],
)
def test_batches(change, message):
    inputs = list(arguments(*ragged(["sender", "solver"], 3)))
    change(inputs)
    with pytest.raises(ValueError, match=message):
        system()(*inputs)


def test_an_empty_batch():
    empty = torch.zeros(0, dtype=torch.int64)
    with pytest.raises(ValueError, match="prompt_lengths of agent sender"):
        system()([empty, empty], [[], []], empty, [])


def test_an_implementation_that_is_not_there():
    inputs = arguments(*ragged(["sender", "solver"], 2))
    with pytest.raises(ValueError, match="backend is 'fast'; allowed: auto, reference"):
        system(backend="fast")(*inputs)
    with pytest.raises(UnsupportedError, match="'cuda' cannot run .*: it runs on cuda tensors only, not on cpu"):
        system(backend="cuda")(*inputs)


def test_alignment_arguments():
    with pytest.raises(ValueError, match="alignment is 'x'"):
        AlignmentOptions("x")
    with pytest.raises(ValueError, match="alignment_initial is 'x'"):
        AlignmentOptions(alignment_initial="x")


def test_heads_and_embeddings_that_a_soft_alignment_cannot_read():
    with pytest.raises(
        UnsupportedModelError, match="reads the head's weights, but the model's head is a peft.*Linear, not"
    ):
        MultiAgentSystem(with_lora(causal_lm("qwen3"), targets=["q_proj", "lm_head"]), "relay", alignment="soft")
    model = causal_lm("qwen3")
    model.lm_head = torch.nn.Linear(16, 41, bias=False, dtype=torch.float64)
    with pytest.raises(UnsupportedModelError, match="has 37 input embeddings and a head for 41 tokens"):
        MultiAgentSystem(model, "relay", alignment="soft")


def test_a_second_backward_raises():
    output = system()(*arguments(*ragged(["sender", "solver"], 2)))
    output.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a trace can be differentiated once"):
        output.loss.backward()


def test_a_second_order_gradient_raises():
    s = system()
    output = s(*arguments(*ragged(["sender", "solver"], 2)))
    (grad,) = torch.autograd.grad(output.loss, [s.agent_model.model.get_input_embeddings().weight], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_the_trace_keeps_its_room_tight():
    s = system(latent_steps=3)
    prompts, answers = ragged(["sender", "solver"], 3)
    ids, lengths = zip(*(packed(rows) for rows in prompts.values()), strict=True)
    trace = s.trajectory.communicate(ids, lengths, [len(a) for a in answers]).trace
    assert trace.capacity == max(3 + len(p) + len(a) for p, a in zip(prompts["solver"], answers, strict=True))


def test_a_model_that_was_refused_is_refused_again():
    config = transformers.BartConfig(
        vocab_size=37, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=24, pad_token_id=0,
        init_std=0.5, is_decoder=True, is_encoder_decoder=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BartForCausalLM(config)
    for _ in range(3):
        with pytest.raises(UnsupportedModelError, match="comes to something else through a trace than by itself"):
            MultiAgentSystem(model, TOPOLOGIES["relay"], latent_steps=1)
