"""When a fused decoder layer steps aside, and that the result is the same either way."""

import types

import pytest
import torch
from compare import assert_same, error, gradients
from tiny_models import arguments, causal_lm, clone, ragged, with_lora
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from diffmas.agents.topology import TOPOLOGIES
from diffmas.embedded.tokenizer import build_tokenizer
from diffmas.generation import Decoding
from diffmas.models import decoder_layer
from diffmas.system import MultiAgentSystem
from diffmas_ops import KVTrace, library

pytestmark = pytest.mark.skipif(library.failure("cpu") is not None, reason=str(library.failure("cpu")))


def run(model, monkeypatch, **options):
    """Loss, gradients, and how many layers ran fused."""
    return run_system(MultiAgentSystem(model, TOPOLOGIES["sequential"], latent_steps=2, **options), monkeypatch)


def run_system(system, monkeypatch):
    fused, runs = decoder_layer._run, []
    monkeypatch.setattr(decoder_layer, "_run", lambda *args: runs.append(1) or fused(*args))
    output = system(*arguments(*ragged([a.name for a in system.topology.agents], 3)))
    output.loss.backward()
    monkeypatch.undo()
    return output.loss.detach(), gradients(system.agent_model.model), len(runs)


def test_decoding_runs_fused(monkeypatch):
    """A decoding step is no call of a trace, and takes its layers all the same."""
    tokenizer, runs, fused = build_tokenizer(), [], decoder_layer._run
    model = with_lora(causal_lm("qwen3", vocab_size=len(tokenizer), eos_token_id=None), embeddings=False).eval()
    system = MultiAgentSystem(model, TOPOLOGIES["single"])
    monkeypatch.setattr(decoder_layer, "_run", lambda *args: runs.append(1) or fused(*args))
    decoding = Decoding(max_new_tokens=5, temperature=0)
    (answers,) = system.generate([torch.arange(5, 12)], [[7]], tokenizer, decoding)
    # The prompt, and every token but the last, in both layers.
    assert len(answers[0].logprobs) == 5 and len(runs) == 2 * 5


def layer_of(model):
    return getattr(model, "get_base_model", lambda: model)().get_decoder().layers[0]


@pytest.mark.parametrize(
    "change",
    [
        lambda model: layer_of(model).self_attn.q_proj.register_forward_hook(lambda *_: None),
        lambda model: layer_of(model).mlp.act_fn.register_forward_hook(lambda *_: None),
        lambda model: layer_of(model).mlp.register_full_backward_hook(lambda *_: None),
        lambda model: layer_of(model).input_layernorm.weight.requires_grad_(),
    ],
    ids=["projection's hook", "activation's hook", "backward hook", "trained norm"],
)
def test_one_layer_steps_aside(change, monkeypatch):
    plain = with_lora(causal_lm("qwen3"))
    loss, grads, whole = run(clone(plain), monkeypatch)
    changed = clone(plain)
    change(changed)
    other, other_grads, runs = run(changed, monkeypatch)
    assert whole > 0 and runs == whole // 2
    assert error(other, loss) < 1e-12
    assert_same({n: other_grads[n] for n in grads}, grads, 1e-10)


def _scale(model):
    layer_of(model).self_attn.v_proj.scaling["default"] = 0.25


def _other_adapter(model):
    torch.manual_seed(7)
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")


def _other_parameter(model):
    layer_of(model).mlp.up_proj.lora_B["default"].weight = torch.nn.Parameter(
        torch.ones_like(layer_of(model).mlp.up_proj.lora_B["default"].weight)
    )


def _other_norm(model):
    layer_of(model).input_layernorm.weight = torch.nn.Parameter(
        2 * layer_of(model).input_layernorm.weight.detach(), requires_grad=False
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda model: layer_of(model).self_attn.v_proj.register_forward_hook(lambda m, x, y: 2 * y),
        lambda model: layer_of(model).mlp.up_proj.lora_A["default"].register_forward_hook(lambda m, x, y: 2 * y),
        lambda model: layer_of(model).mlp.up_proj.merge(),
        lambda model: layer_of(model).mlp.up_proj.enable_adapters(False),
        lambda model: setattr(layer_of(model).self_attn.q_norm, "variance_epsilon", 0.3),
        _scale, _other_adapter, _other_parameter, _other_norm,
    ],
    ids=["hook", "adapter's hook", "merged", "disabled", "epsilon", "scale", "adapter", "parameter", "norm"],
)  # fmt: skip
def test_what_has_changed_since_the_last_call_is_seen(change, monkeypatch):
    plain = with_lora(causal_lm("qwen3"))
    used, fresh = clone(plain), clone(plain)
    before, _, whole = run(used, monkeypatch)
    used.zero_grad()
    change(used)
    change(fresh)
    loss, grads, runs = run(used, monkeypatch)
    assert error(loss, before) > 1e-6 or runs < whole
    wanted, wanted_grads, _ = run(fresh, monkeypatch)
    assert torch.equal(loss, wanted)
    assert_same(grads, wanted_grads, 0)


class _Mlp(qwen3.Qwen3MLP):
    def forward(self, x):
        return 0.5 * super().forward(x)


class _Attention(qwen3.Qwen3Attention):
    """Nothing of its gate shows in what a model made with it computes."""

    def __init__(self, *args):
        super().__init__(*args)
        self.gate = nn.Parameter(torch.zeros(16))

    def forward(self, hidden_states, *args, **kwargs):
        out, weights = super().forward(hidden_states, *args, **kwargs)
        return out * (1 + self.gate), weights


class _Norm(qwen3.Qwen3RMSNorm):
    def __init__(self, *args):
        super().__init__(*args)
        self.gate = nn.Parameter(torch.zeros(16))

    def forward(self, hidden_states):
        return super().forward(hidden_states) + self.gate


class _Layer(qwen3.Qwen3DecoderLayer):
    def __init__(self, *args):
        super().__init__(*args)
        self.gate = nn.Parameter(torch.zeros(16))

    def forward(self, hidden_states, *args, **kwargs):
        return super().forward(hidden_states, *args, **kwargs) + self.gate * hidden_states


class _Sigmoid(nn.Sigmoid):
    pass


_Layer.__name__, _Sigmoid.__name__ = "Qwen3DecoderLayer", "SiLU"


def _put(holder, name, new):
    """`new` as `holder.name`, with what it shares with the one there."""
    old = getattr(holder, name)
    new.load_state_dict(old.state_dict(), strict=False)
    setattr(holder, name, new.to(torch.float64).requires_grad_(False))


def _forward_with_gate(model):
    norm = layer_of(model).input_layernorm
    norm.gate = nn.Parameter(torch.zeros(16, dtype=torch.float64))
    norm.forward = types.MethodType(lambda self, x: qwen3.Qwen3RMSNorm.forward(self, x) + self.gate, norm)


def _transposed_in_memory(model):
    linear = layer_of(model).mlp.up_proj
    linear.weight = nn.Parameter(linear.weight.data.t().contiguous().t(), requires_grad=False)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: _put(layer_of(model), "mlp", _Mlp(model.config)),
        lambda model: _put(layer_of(model), "self_attn", _Attention(model.config, 0)),
        lambda model: _put(layer_of(model), "input_layernorm", _Norm(16)),
        lambda model: _put(model.get_decoder().layers, "0", _Layer(model.config, 0)),
        lambda model: setattr(layer_of(model).mlp, "act_fn", _Sigmoid()),
        lambda model: setattr(layer_of(model).mlp, "__class__", _Mlp),
        _forward_with_gate,
        _transposed_in_memory,
    ],
    ids=["mlp", "attention", "norm", "layer", "activation", "class", "norm's forward", "weight's strides"],
)
def test_code_of_others_runs_as_it_is(change, monkeypatch):
    plain = causal_lm("qwen3").requires_grad_(False)
    plain.get_input_embeddings().weight.requires_grad_()
    whole = run(after := clone(plain), monkeypatch)[2]
    before = clone(plain)
    for model in (before, after):
        change(model)
        assert run(model, monkeypatch)[2] == whole // 2
        for name, parameter in model.named_parameters():
            if name.endswith("gate"):  # stands for training
                parameter.requires_grad_().data.fill_(0.3)
        model.zero_grad()
        loss, grads, _ = run(model, monkeypatch)
        model.zero_grad()
        wanted, wanted_grads, _ = run(model, monkeypatch, backend="reference")
        assert error(loss, wanted) < 1e-12
        assert_same(grads, wanted_grads, 1e-10)


@pytest.mark.parametrize("holder, name", [(qwen3.Qwen3MLP, "forward"), (qwen3, "apply_rotary_pos_emb")])
def test_transformers_own_code_replaced(holder, name, monkeypatch):
    model, own = with_lora(causal_lm("qwen3")), getattr(holder, name)
    whole = run(model, monkeypatch)[2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(holder, name, lambda *args: own(*args))
        assert run(model, monkeypatch)[2] == run(clone(model), monkeypatch)[2] == 0
    assert run(model, monkeypatch)[2] == whole


def test_hooks_of_all_modules_are_run(monkeypatch):
    model, seen = with_lora(causal_lm("qwen3")), []
    whole = run(model, monkeypatch)[2]
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        assert run(model, monkeypatch)[2] == 0
    finally:
        handle.remove()
    # Those of LoRA's layers among them.
    assert seen.count(nn.Linear) > whole and run(model, monkeypatch)[2] == whole


def test_dropout_set_afterwards_is_refused(monkeypatch):
    system = MultiAgentSystem(with_lora(causal_lm("qwen3")), TOPOLOGIES["relay"], latent_steps=1).train()
    layer_of(system.agent_model.model).self_attn.attention_dropout = 0.5
    with pytest.raises(ValueError, match="attention dropout is 0.5; allowed: 0"):
        system(*arguments(*ragged(["sender", "solver"], 2)))


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_another_dtype_afterwards(dtypes, monkeypatch):
    began, ends = dtypes
    model = with_lora(causal_lm("llama", dtype=began), targets=["q_proj"])
    system = MultiAgentSystem(model, TOPOLOGIES["sequential"], latent_steps=2)
    whole = run_system(system, monkeypatch)[2]
    system.to(ends).zero_grad()
    loss, grads, runs = run_system(system, monkeypatch)
    wanted, wanted_grads, _ = run(clone(model), monkeypatch, backend="reference")
    # In one of both, transformers' own norms compute in float32.
    assert runs == whole and error(loss, wanted) < 1e-6
    assert_same(grads, wanted_grads, 1e-4)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_an_implementation_that_is_insisted_on(backend, monkeypatch):
    plain = with_lora(causal_lm("llama"))
    loss, grads, _ = run(clone(plain), monkeypatch)
    other, other_grads, runs = run(clone(plain), monkeypatch, backend=backend)
    assert bool(runs) == (backend == "cpu")
    assert error(other, loss) < 1e-12
    assert_same(other_grads, grads, 1e-10)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_torch_compile_goes_around_a_fused_layer(monkeypatch):
    """Same numbers, and nothing is compiled anew for every call."""
    plain = with_lora(causal_lm("qwen3"))
    loss, grads, runs = run(clone(plain), monkeypatch)
    compiled, graphs = clone(plain), CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    compiled.get_base_model().get_decoder().compile(backend=graphs)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        other, other_grads, other_runs = run(compiled, monkeypatch)
    assert graphs.frame_count > 0 and other_runs == runs > 0
    assert error(other, loss) < 1e-12
    assert_same(other_grads, grads, 1e-10)


def test_last_layer_leaves_out_what_is_not_wanted():
    system = MultiAgentSystem(with_lora(causal_lm("qwen3")), TOPOLOGIES["sequential"], latent_steps=1)
    ids, lengths, wanted = torch.arange(9), [4, 5], [(3, 4), (1, 3)]

    def trace():
        return KVTrace.allocate(num_layers=2, batch=2, num_kv_heads=2, capacity=8, head_dim=8, dtype=torch.float64)

    whole = system.agent_model.read(trace(), lengths, input_ids=ids)
    some = system.agent_model.read(trace(), lengths, input_ids=ids, outputs=wanted)
    assert error(some, whole[[3, 5, 6]]) < 1e-12
    with pytest.raises(ValueError, match="outputs is"):
        system.agent_model.read(trace(), lengths, input_ids=ids, outputs=[(0, 5), (0, 1)])
    with pytest.raises(ValueError, match="outputs is .* beside an open call"):
        opened = trace()
        system.agent_model.read(opened, opened.open(lengths), input_ids=ids, outputs=wanted)
