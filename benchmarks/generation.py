"""Decoding: a system of one agent against transformers' `generate` on the same model and ragged prompts."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from benchmarks.cases import Case, Work
from benchmarks.experiment import Contender, Experiment
from diffmas.agents.topology import TOPOLOGIES
from diffmas.embedded import EMBEDDED_PATH
from diffmas.generation import Decoding
from diffmas.system import MultiAgentSystem

OURS, PEER = "diffmas", "transformers generate, left-padded"


@dataclass(frozen=True)
class Generation(Case):
    """`new` greedy tokens a row behind prompts of up to `prompt` tokens; `layers` 0 is the embedded base."""

    batch: int
    prompt: int
    new: int
    layers: int = 0
    hidden: int = 64
    intermediate: int = 192
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 64
    vocab: int = 595
    dtype: str = "float32"

    def _sizes(self):
        model = f"{self.layers} layers {self.hidden}" if self.layers else "embedded base"
        return {"model": model, "B": self.batch, "prompt": f"1-{self.prompt}", "new": self.new}

    def lengths(self) -> list[int]:
        """Of the prompts, from 1 to `prompt`, evenly spread."""
        return [1 + (self.prompt - 1) * (row + 1) // self.batch for row in range(self.batch)]

    def rows(self) -> list[Tensor]:
        """Token ids of the prompts."""
        generator = torch.Generator().manual_seed(0)
        return [torch.randint(0, min(self.vocab, 256), (n,), generator=generator) for n in self.lengths()]

    def generation(self) -> Work:
        """Every prompt once; every step reads the weights and the rows' keys and values."""
        layers = self.layers or 2
        attention = (2 * self.heads + 2 * self.kv_heads) * self.head_dim * self.hidden
        weights = layers * (attention + 3 * self.hidden * self.intermediate)
        head = self.vocab * self.hidden
        tokens = sum(self.lengths()) + self.batch * (self.new - 1)
        pairs = sum((n + self.new - 1) * (n + self.new) / 2 for n in self.lengths())
        flops = (
            2 * weights * tokens + 2 * head * self.batch * self.new + 4 * layers * self.heads * self.head_dim * pairs
        )
        columns = sum(n * self.new + self.new * (self.new - 1) / 2 for n in self.lengths())
        trace = 2 * layers * self.kv_heads * self.head_dim * columns
        return Work(flops, (self.new * (weights + head) + trace) * self.item)


_QWEN3 = dict(layers=4, hidden=256, intermediate=768, heads=8, kv_heads=2, head_dim=64, vocab=4096)
CASES = [
    Generation(1, 60, 64),
    Generation(16, 60, 64),
    Generation(16, 64, 64, **_QWEN3),
    Generation(16, 512, 64, **_QWEN3),
]


def build(case: Generation, device: str, model: torch.nn.Module | None = None) -> Experiment:
    """The tokens of all rows, which have to be the same; nobody stops early.

    `model`: of the case's sizes, perhaps in PEFT; default: the embedded base, or a random one.
    """
    model = _model(case) if model is None else model
    model = model.to(device=device, dtype=getattr(torch, case.dtype)).eval()
    # As PEFT leaves a base model: layers that do not train run fused.
    model.requires_grad_(False).generation_config.eos_token_id = None
    twin = copy.deepcopy(model)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_PATH)
    pad, tokenizer.eos_token, tokenizer.chat_template = tokenizer.pad_token_id, None, None
    system = MultiAgentSystem(model, TOPOLOGIES["single"])
    decoding = Decoding(max_new_tokens=case.new, temperature=0)
    rows = case.rows()
    packed = torch.cat(rows).to(device)
    longest = max(case.lengths())
    ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0), value=pad) for row in rows]).to(device)
    mask = torch.stack([torch.arange(longest) >= longest - len(row) for row in rows]).long().to(device)

    def ours(_) -> Tensor:
        answers = system.generate([packed], [case.lengths()], tokenizer, decoding)
        return torch.tensor([samples[0].tokens for samples in answers])

    @torch.no_grad()
    def theirs(_) -> Tensor:
        output = twin.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=case.new, do_sample=False, pad_token_id=pad
        )
        return output[:, longest:].cpu()

    return Experiment(
        operator="decoding",
        direction="generation",
        case=case,
        work=case.generation(),
        contenders={
            name: Contender(run, read=lambda tokens: (tokens,)) for name, run in ((OURS, ours), (PEER, theirs))
        },
        ours=OURS,
        implementations=(OURS,),
        plain=(PEER,),
        exact=PEER,
        tolerance=0.0,
        device=device,
        outputs=("tokens",),
    )


def _model(case: Generation) -> PreTrainedModel:
    if not case.layers:
        return AutoModelForCausalLM.from_pretrained(EMBEDDED_PATH)
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=case.vocab, hidden_size=case.hidden, intermediate_size=case.intermediate,
            num_hidden_layers=case.layers, num_attention_heads=case.heads, num_key_value_heads=case.kv_heads,
            head_dim=case.head_dim, max_position_embeddings=4096, tie_word_embeddings=False,
            eos_token_id=None, bos_token_id=None,
        )
    )  # fmt: skip
