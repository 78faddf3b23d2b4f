"""The training step: MultiAgentSystem against the same model, adapter and data on a DynamicCache."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from benchmarks import peers
from benchmarks.cases import Step
from benchmarks.experiment import Contender, Experiment
from benchmarks.memory import saved_bytes
from diffmas.agents.captured_rollouts import CapturedRollouts
from diffmas.agents.latent_rollouts import step_by_step
from diffmas.agents.topology import Agent, Topology
from diffmas.system import MultiAgentSystem
from diffmas_ops import KVTrace

PEER = "DynamicCache + SDPA"
OURS, CHECKPOINTED, CAPTURED = "diffmas", "diffmas, checkpointing", "diffmas, captured"


def build(case: Step, device: str, model: torch.nn.Module | None = None) -> Experiment:
    """Loss and all gradients of one step; rows of one length, so that the peer needs no padding.

    `model`: as for :func:`contenders_of`.
    """
    contenders, twin = contenders_of(case, device, model)
    del contenders[CAPTURED]
    precise = torch.float64 if case.dtype == "float32" else torch.float32

    def exact() -> tuple[Tensor, ...]:
        wide = copy.deepcopy(twin.model).to(precise).get_base_model()
        loss = peers.sequential_loss(wide, *twin.data, case.latent)
        loss.backward()
        return loss.detach(), _gradients(wide)

    return Experiment(
        operator="step",
        direction="step",
        case=case,
        work=case.step(),
        contenders=contenders,
        ours=OURS,
        implementations=(OURS, CHECKPOINTED),
        plain=(PEER,),
        # Gradients through many latent steps of a random model lose digits in the peer too, more than a fixed bound.
        exact=exact,
        factor=3.0,
        floor=1e-5,
        device=device,
        outputs=("loss", "gradients"),
    )


@dataclass(frozen=True)
class Twin:
    """The peer's model, whose frozen weights are ours, and both sides' prompts and answer."""

    model: torch.nn.Module
    data: tuple[list[Tensor], Tensor]
    system: MultiAgentSystem


def contenders_of(case: Step, device: str, model: torch.nn.Module | None = None) -> tuple[dict[str, Contender], Twin]:
    """Ours (also with checkpointing, with captured latent rollouts) and the peer: the same weights, one batch.

    `model`: of the case's sizes and in PEFT; default: :func:`lora_model`.
    """
    model = lora_model(case, device) if model is None else model
    twin = copy.deepcopy(model)
    for own, frozen in zip(twin.parameters(), model.parameters(), strict=True):
        if not frozen.requires_grad:
            own.data = frozen.data
    twin.get_base_model().set_attn_implementation("sdpa")
    names = [f"agent{i}" for i in range(case.agents)]
    topology = Topology("chain", tuple(Agent(n, tuple(names[max(0, i - 1) : i])) for i, n in enumerate(names)))
    system = MultiAgentSystem(model, topology, latent_steps=case.latent)
    prompts, answer = tokens(case, device)
    lengths = [[case.prompt] * case.batch] * case.agents

    def ours() -> Tensor:
        ids = [p.flatten() for p in prompts]
        return system(ids, lengths, answer.flatten(), [case.answer] * case.batch, return_logits=False).loss

    def theirs() -> Tensor:
        return peers.sequential_loss(twin.get_base_model(), prompts, answer, case.latent)

    def replayed() -> Tensor:
        loss = ours()
        if not runs.recordings:
            raise RuntimeError("latent rollouts were not captured")
        return loss

    def captured() -> None:
        without()
        system.trajectory = replace(system.trajectory, latent_rollout=runs, allocate=runs.allocate)

    runs = CapturedRollouts()

    def without() -> None:
        system.trajectory = replace(system.trajectory, latent_rollout=step_by_step, allocate=KVTrace.allocate)
        system.agent_model.language_model.gradient_checkpointing_disable()

    def checkpointing() -> None:
        without()
        system.agent_model.language_model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )

    trace = 2 * case.layers * case.batch * case.kv_heads * case.columns * case.head_dim * case.item
    contenders = {
        OURS: _contender(model, ours, without, trace),
        CHECKPOINTED: _contender(model, ours, checkpointing, trace),
        CAPTURED: _contender(model, replayed, captured, trace),
        PEER: _contender(twin, theirs, lambda: None, 0),
    }
    return contenders, Twin(twin, (prompts, answer), system)


def _contender(model, forward: Callable[[], Tensor], configure: Callable[[], None], trace_bytes: int) -> Contender:
    def prepare():
        configure()
        model.zero_grad(set_to_none=True)

    record: dict[str, int] | None = None

    def run(_):
        if record is None:
            loss = forward()
        else:
            record["saved_bytes"], loss = saved_bytes(forward, model)
        loss.backward()
        return loss.detach()

    @contextlib.contextmanager
    def watch():
        nonlocal record
        record = {"trace_bytes": trace_bytes}
        yield record
        record = None

    return Contender(run, prepare, lambda loss: (loss, _gradients(model)), watch=watch)


def _gradients(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).clone()


def lora_model(case: Step, device: str) -> PeftModel:
    """A random Qwen3 with LoRA on every linear layer, whose B matrices are not zero."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=case.vocab, hidden_size=case.hidden, intermediate_size=case.intermediate,
        num_hidden_layers=case.layers, num_attention_heads=case.heads, num_key_value_heads=case.kv_heads,
        head_dim=case.head_dim, max_position_embeddings=2 * case.columns, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device(device):
        return adapted(Qwen3ForCausalLM(config).to(getattr(torch, case.dtype)))


def adapted(model: PreTrainedModel) -> PeftModel:
    """`model` with LoRA on every linear layer, whose B matrices are not zero."""
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.device(model.device):
        model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.train()


def tokens(case: Step, device: str) -> tuple[list[Tensor], Tensor]:
    shapes = [case.prompt] * case.agents + [case.answer]
    *prompts, answer = (torch.randint(case.vocab, (case.batch, n), device=device) for n in shapes)
    return prompts, answer
