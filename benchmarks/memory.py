"""Bytes saved for backward by a training trajectory: ours against transformers' DynamicCache.

Run `python -m benchmarks.memory` for the full configuration: a Qwen3-shaped eight-layer model, four agents in
sequence, prompts of 512 tokens, m = 40.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM

from diffmas.agents.topology import TOPOLOGIES
from diffmas.system import MultiAgentSystem


@dataclass(frozen=True)
class Size:
    """One row's trajectory through `agents` in sequence on a Qwen3-shaped model in float32."""

    layers: int = 8
    hidden: int = 256
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 64
    intermediate: int = 768
    vocab: int = 1024
    prompt: int = 512
    latent_steps: int = 40
    answer: int = 32

    @property
    def topology(self):
        return TOPOLOGIES["sequential"]

    def model(self) -> Qwen3ForCausalLM:
        """A frozen random model; the input embedding alone trains, so that every layer takes part in the gradient."""
        config = Qwen3Config(
            vocab_size=self.vocab, hidden_size=self.hidden, intermediate_size=self.intermediate,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim, max_position_embeddings=65536, tie_word_embeddings=True,
        )  # fmt: skip
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(config).requires_grad_(False).train()
        model.get_input_embeddings().weight.requires_grad_()
        return model

    def tokens(self) -> tuple[list[Tensor], Tensor]:
        """The agents' prompts and the answer."""
        generator = torch.Generator().manual_seed(0)
        lengths = [self.prompt] * len(self.topology.agents) + [self.answer]
        *prompts, answer = (torch.randint(self.vocab, (n,), generator=generator) for n in lengths)
        return prompts, answer

    @property
    def trace_bytes(self) -> int:
        agents = len(self.topology.agents)
        columns = agents * self.prompt + (agents - 1) * self.latent_steps + self.answer
        return 2 * self.layers * self.kv_heads * self.head_dim * columns * 4


def saved_bytes(run: Callable[[], Tensor], exclude: nn.Module) -> tuple[int, Tensor]:
    """Bytes of the distinct storages autograd keeps for the backward of `run()`, and what it returned.

    The parameters and buffers of `exclude` are there anyway and do not count.
    """
    own = {t.untyped_storage().data_ptr() for t in (*exclude.parameters(), *exclude.buffers())}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    # Packed tensors stay referenced by the result's graph, so that no address is counted for two storages.
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    return sum(sizes.values()), result


def diffmas_run(model: nn.Module, size: Size, backend: str = "auto") -> Callable[[], Tensor]:
    """One row's loss through `MultiAgentSystem`."""
    system = MultiAgentSystem(model, size.topology, latent_steps=size.latent_steps, backend=backend)
    prompts, answer = size.tokens()
    lengths = [[len(p)] for p in prompts]
    return lambda: system(prompts, lengths, answer, [len(answer)]).loss


def dynamic_cache_run(model: nn.Module, size: Size) -> Callable[[], Tensor]:
    """The same loss as a careful user writes it today: one DynamicCache through all agents, SDPA."""
    model.set_attn_implementation("sdpa")
    prompts, answer = size.tokens()
    decoder = model.get_decoder()
    rho = float(model.get_input_embeddings().weight.detach().norm(dim=-1).mean())

    def run() -> Tensor:
        cache = DynamicCache()

        def read(**inputs):
            return decoder(**inputs, past_key_values=cache, use_cache=True).last_hidden_state

        for prompt in prompts[:-1]:
            hidden = read(input_ids=prompt[None])[:, -1:]
            for _ in range(size.latent_steps):
                hidden = read(inputs_embeds=rho * hidden / hidden.norm(dim=-1, keepdim=True))
        hidden = read(input_ids=torch.cat((prompts[-1], answer))[None])
        logits = model.get_output_embeddings()(hidden[0, len(prompts[-1]) - 1 : -1])
        return nn.functional.cross_entropy(logits, answer)

    return run


@dataclass(frozen=True)
class Measurement:
    """Bytes that live until the backward, loss, and gradient of the input embedding."""

    saved: int
    trace: int
    loss: float
    gradient: Tensor

    @property
    def total(self) -> int:
        return self.saved + self.trace


def measure(way: str, size: Size) -> Measurement:
    """`way` is "dynamic_cache", "diffmas" or "diffmas+checkpointing".

    `saved` is what autograd keeps. Our trace lives beside it and is counted as `trace`; the DynamicCache's last
    keys and values are among what autograd keeps.
    """
    model = size.model()
    if way.endswith("+checkpointing"):
        # The older of the two names warns where both are there.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    peer = way == "dynamic_cache"
    saved, loss = saved_bytes((dynamic_cache_run if peer else diffmas_run)(model, size), model)
    loss.backward()
    return Measurement(saved, 0 if peer else size.trace_bytes, loss.item(), model.get_input_embeddings().weight.grad)


def power_law(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Exponent and R² of `y = c · x ** exponent`, fitted to logarithms."""
    a, b = [math.log(v) for v in x], [math.log(v) for v in y]
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    s_ab = sum((p - mean_a) * (q - mean_b) for p, q in zip(a, b, strict=True))
    s_aa, s_bb = (sum((p - m) ** 2 for p in v) for v, m in ((a, mean_a), (b, mean_b)))
    return s_ab / s_aa, s_ab**2 / (s_aa * s_bb)


def line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Intercept, slope and R² of `y = intercept + slope · x`."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    s_xy = sum((p - mean_x) * (q - mean_y) for p, q in zip(x, y, strict=True))
    s_xx, s_yy = (sum((p - m) ** 2 for p in v) for v, m in ((x, mean_x), (y, mean_y)))
    return mean_y - s_xy / s_xx * mean_x, s_xy / s_xx, s_xy**2 / (s_xx * s_yy)


def main() -> None:
    argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__).parse_args()
    size = Size()
    results = {way: measure(way, size) for way in ("dynamic_cache", "diffmas", "diffmas+checkpointing")}
    peer = results["dynamic_cache"]
    for way, result in results.items():
        error = float((result.gradient - peer.gradient).norm() / peer.gradient.norm())
        print(
            f"{way:22} saved {result.saved / 1e6:7.1f} MB (1/{peer.saved / result.saved:.1f})  "
            f"with trace {result.total / 1e6:7.1f} MB (1/{peer.total / result.total:.1f})  gradient error {error:.1e}"
        )


if __name__ == "__main__":
    main()
