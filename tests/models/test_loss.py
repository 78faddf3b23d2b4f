"""The chunked loss against all logits at once: value, gradients, what it holds, and where it steps aside."""

import sys
import types

import pytest
import torch
from compare import assert_same, error, gradients
from peft import LoraConfig, get_peft_model
from tiny_models import arguments, causal_lm, clone, packed, ragged, with_lora
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from diffmas.agents.topology import TOPOLOGIES
from diffmas.models import loss as losses
from diffmas.models.head import Head
from diffmas.models.loss import AnswerLoss, chunk_tokens, plain_loss
from diffmas.system import MultiAgentSystem

VOCAB, HIDDEN, TOKENS = 23, 8, 11
NAMES = [a.name for a in TOPOLOGIES["sequential"].agents]


#: Scales and caps of logits.
BENT = [(0.37, None), (-3.0, 0.8), (1.0, 1.5), (2.5, 30.0)]


@pytest.fixture(params=[1, 4, TOKENS, 100])
def chunk(request, monkeypatch):
    """Tokens of a chunk, whatever the dtype."""
    monkeypatch.setattr(losses, "chunk_tokens", lambda *args: request.param)
    return request.param


def inputs(dtype=torch.float64, bias=True, trained=True, seed=0):
    torch.manual_seed(seed)
    head = nn.Linear(HIDDEN, VOCAB, bias=bias).double().requires_grad_(trained)
    hidden = torch.randn(TOKENS, HIDDEN, dtype=torch.float64)
    # Gold tokens at both ends of the vocabulary, and one of them twice.
    targets = torch.randint(VOCAB, (TOKENS,))
    targets[:3] = torch.tensor([0, VOCAB - 1, 0])
    return head.to(dtype), hidden.to(dtype).requires_grad_(), targets


def result(loss, head, hidden, scale):
    tensors = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    return [loss.detach(), *torch.autograd.grad(loss * scale, tensors)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_equals_plain_in_float64(chunk, bias, trained):
    head, hidden, targets = inputs(bias=bias, trained=trained)
    # The scale is what a division by the number of items and a gradient scaler make of the incoming gradient.
    actual = result(AnswerLoss("chunked")(Head(head), hidden, targets), head, hidden, -0.37)
    expected = result(plain_loss(head(hidden), targets), head, hidden, -0.37)
    assert len(actual) == len(expected) == 2 + trained * (1 + bias)
    assert all(error(a, e) <= 1e-12 for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("scale, cap", BENT)
@pytest.mark.parametrize("bias", [False, True])
def test_scaled_and_capped_logits_in_float64(chunk, bias, scale, cap, poison):
    head, hidden, targets = inputs(bias=bias)
    logits = scale * nn.functional.linear(4 * hidden, head.weight, head.bias)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    expected = result(plain_loss(logits, targets), head, hidden, -0.37)
    for kind in ("chunked", "plain"):
        actual = result(AnswerLoss(kind)(Head(head, scale, cap), 4 * hidden, targets), head, hidden, -0.37)
        assert all(error(a, e) <= 1e-12 for a, e in zip(actual, expected, strict=True)), kind


@pytest.mark.parametrize("scale, cap", [(1.0, None), (0.37, None), (2.5, 1.5)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision(chunk, dtype, scale, cap):
    def total(take, dtype):
        """Errors of value and gradients, together over many draws."""
        differences = []
        for seed in range(30):
            head, hidden, targets = inputs(dtype, seed=seed)
            wide_head, wide_hidden, _ = inputs(dtype, seed=seed)
            wide_head, wide_hidden = wide_head.double(), wide_hidden.detach().double().requires_grad_()
            wide = Head(wide_head, scale, cap)(wide_hidden)
            expected = result(plain_loss(wide, targets), wide_head, wide_hidden, 0.3)
            actual = result(take(head, hidden, targets), head, hidden, 0.3)
            assert actual[0].dtype == torch.float32
            assert [a.dtype for a in actual[1:]] == [dtype] * 3
            differences.append([error(a, e) for a, e in zip(actual, expected, strict=True)])
        return torch.tensor(differences).mean(0)

    ours = total(lambda head, hidden, targets: AnswerLoss("chunked")(Head(head, scale, cap), hidden, targets), dtype)
    plain = total(lambda head, hidden, targets: plain_loss(Head(head, scale, cap)(hidden), targets), dtype)
    assert ours[0] <= 2 * plain[0] and (ours[1:] <= 3 * plain[1:]).all(), (ours, plain)


def test_autocast():
    head, hidden, targets = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = AnswerLoss("chunked")(Head(head), hidden, targets)
        expected = plain_loss(head(hidden), targets)
    assert loss.dtype == torch.float32 and error(loss, expected) < 1e-6
    actual, expected = (result(x, head, hidden, 1.0) for x in (loss, expected))
    assert all(a.dtype == torch.float32 and error(a, e) < 1e-2 for a, e in zip(actual, expected, strict=True))


class Widest(TorchDispatchMode):
    """The most rows of a tensor with a column per token of the vocabulary, other than views of `weight`."""

    def __init__(self, weight):
        super().__init__()
        self.rows, self._storage = 0, weight.untyped_storage().data_ptr()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        wide = isinstance(out, torch.Tensor) and out.dim() == 2 and out.shape[1] == VOCAB
        if wide and out.untyped_storage().data_ptr() != self._storage:
            self.rows = max(self.rows, out.shape[0])
        return out


@pytest.mark.parametrize("scale, cap", [(1.0, None), *BENT])
def test_never_holds_more_logits_than_a_chunk(chunk, scale, cap):
    head, hidden, targets = inputs(trained=False)
    with Widest(head.weight) as widest:
        AnswerLoss("chunked")(Head(head, scale, cap), hidden, targets).backward()
    assert widest.rows == min(chunk, TOKENS)


def test_chunk_fits_its_bytes():
    for vocab, dtype, each in ((151_936, torch.bfloat16, 6), (32_000, torch.float32, 8), (1000, torch.float64, 16)):
        tokens = chunk_tokens(vocab, dtype)
        assert tokens * vocab * each <= losses.CHUNK_BYTES < (tokens + 1) * vocab * each
    assert chunk_tokens(10**9, torch.float32) == 1
    tokens = chunk_tokens(256_000, torch.bfloat16, True)
    assert tokens * 256_000 * 14 <= losses.CHUNK_BYTES < (tokens + 1) * 256_000 * 14


def test_without_gradients_none_are_made():
    head, hidden, targets = inputs()
    with torch.no_grad():
        loss = AnswerLoss("chunked")(Head(head), hidden, targets)
    assert not loss.requires_grad and error(loss, plain_loss(head(hidden), targets)) <= 1e-12


def heads():
    """Heads that are more than one linear layer, each with what its refusal has to say."""
    model = get_peft_model(causal_lm("qwen3"), LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    yield "lora", model.get_base_model().lm_head.double(), "is a peft.*Linear, not a torch.nn.Linear"
    plain = [nn.Linear(16, VOCAB).double() for _ in range(3)]
    yield "sequential", nn.Sequential(plain[0]), "is a torch.*Sequential, not a torch.nn.Linear"
    plain[1].register_forward_hook(lambda module, args, out: 2 * out)
    yield "hook", plain[1], "has hooks"
    plain[2].forward = lambda x: 3 * nn.Linear.forward(plain[2], x)
    yield "replaced forward", plain[2], "has a forward that was put in place of its own"


@pytest.mark.parametrize("name, head, why", list(heads()), ids=lambda x: x if isinstance(x, str) else "")
def test_other_heads_take_the_plain_way(name, head, why):
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, 16, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(VOCAB, (TOKENS,))
    assert torch.equal(AnswerLoss("auto")(Head(head), hidden, targets), plain_loss(head(hidden), targets))
    with pytest.raises(ValueError, match=f"loss is 'chunked', but .*{why}"):
        AnswerLoss("chunked")(Head(head), hidden, targets)


@pytest.mark.parametrize("kind, package", [("liger", "liger-kernel"), ("cce", "cut-cross-entropy")])
def test_packages_are_asked_for_by_name(kind, package, monkeypatch):
    monkeypatch.setattr(losses, "_installed", lambda kind: False)
    with pytest.raises(ModuleNotFoundError, match=f"loss is '{kind}'.*pip install {package}"):
        AnswerLoss(kind)
    monkeypatch.setattr(losses, "_installed", lambda kind: True)
    head, *rest = inputs()
    with pytest.raises(ValueError, match=f"loss is '{kind}', but the model is on cpu"):
        AnswerLoss(kind)(Head(head), *rest)
    with pytest.raises(ValueError, match="loss is 'fast'; allowed: auto, chunked"):
        AnswerLoss("fast")


class Liger:
    """liger-kernel's signature; its kernel needs a GPU."""

    def __init__(self, reduction, softcap, accum_dtype):
        assert reduction == "sum" and accum_dtype == torch.float64
        self.softcap = softcap

    def __call__(self, lin_weight, _input, target, bias=None):
        return plain_loss(capped(nn.functional.linear(_input, lin_weight, bias), self.softcap), target)


def cut_cross_entropy(e, c, targets, *, softcap, reduction, filter_eps):
    """cut-cross-entropy's signature."""
    assert reduction == "sum" and filter_eps is None
    return plain_loss(capped(nn.functional.linear(e, c), softcap), targets)


def capped(logits, cap):
    return logits if cap is None else cap * (logits / cap).tanh()


@pytest.mark.parametrize("scale, cap", [(1.0, None), *BENT])
@pytest.mark.parametrize("kind, bias", [("liger", True), ("liger", False), ("cce", False)])
def test_packages_get_their_arguments_in_order(kind, bias, scale, cap, monkeypatch):
    for name, contents in (
        ("liger_kernel", {}),
        ("liger_kernel.transformers", {"LigerFusedLinearCrossEntropyLoss": Liger}),
        ("cut_cross_entropy", {"linear_cross_entropy": cut_cross_entropy}),
    ):
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**contents))
    head, hidden, targets = inputs(bias=bias)
    expected = plain_loss(capped(scale * head(hidden), cap), targets)
    assert error(losses._SERVING[kind](Head(head, scale, cap), hidden, targets), expected) <= 1e-12


@pytest.mark.parametrize("tied", [False, True])
def test_of_a_system(chunk, tied):
    """Tied embeddings that train: the head's gradient joins that of the input embedding."""
    prompts, answers = ragged(NAMES, 3)
    model = with_lora(causal_lm("qwen3", tied=tied)).train()
    outputs = []
    for twin, options in ((model, {"return_logits": False}), (clone(model).train(), {})):
        system = MultiAgentSystem(twin, TOPOLOGIES["sequential"], latent_steps=2, loss="chunked")
        output = system(*arguments(prompts, answers), num_items_in_batch=torch.tensor(7), **options)
        output.loss.backward()
        outputs.append((output, gradients(twin)))
    (without, actual), (whole, expected) = outputs
    assert without.logits is None and whole.logits.shape == (len(packed(answers)[0]), whole.logits.shape[1])
    assert error(without.loss, whole.loss) <= 1e-12
    assert_same(actual, expected, 1e-12)
