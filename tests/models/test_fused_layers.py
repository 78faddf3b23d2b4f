"""When a fused decoder layer steps aside, and that the result is the same either way."""

import pytest
import torch
from compare import assert_same, error, gradients
from tiny_models import arguments, causal_lm, clone, ragged, with_lora
from torch._dynamo.testing import CompileCounterWithBackend

from diffmas.agents.topology import TOPOLOGIES
from diffmas.models import decoder_layer
from diffmas.system import MultiAgentSystem
from diffmas_ops import KVTrace, library

pytestmark = pytest.mark.skipif(library.failure("cpu") is not None, reason=str(library.failure("cpu")))


def run(model, monkeypatch, **options):
    """Loss, gradients, and how many layers ran fused."""
    fused, runs = decoder_layer._run, []
    monkeypatch.setattr(decoder_layer, "_run", lambda *args: runs.append(1) or fused(*args))
    system = MultiAgentSystem(model, TOPOLOGIES["sequential"], latent_steps=2, **options)
    runs.clear()
    output = system(*arguments(*ragged([a.name for a in system.topology.agents], 3)))
    output.loss.backward()
    monkeypatch.undo()
    return output.loss.detach(), gradients(model), len(runs)


def layer_of(model):
    return model.get_base_model().get_decoder().layers[0]


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
