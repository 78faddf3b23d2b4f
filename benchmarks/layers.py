"""`python -m benchmarks.layers`: what it brings that a family's decoder layers run as one operation on the CPU.

A training step and greedy decoding of a small random model with LoRA, once as it is and once with the layers' own
modules, in turn, in processor seconds of one thread; ratios are of the fastest laps. Both are first compared: loss,
gradients and tokens. Leaves `results.json` under `benchmarks/results/layers/` and a table in `docs/kernels.md`.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from rich.progress import track
from torch import Tensor, nn

from benchmarks.experiment import WrongResult, relative_error
from diffmas.agents.topology import TOPOLOGIES
from diffmas.embedded.tokenizer import build_tokenizer
from diffmas.generation import Decoding
from diffmas.models.decoder_layer import FusedLayer
from diffmas.support.machine import machine
from diffmas.system import MultiAgentSystem

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "layers" / "results.json", ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- layers: begin -->", "<!-- layers: end -->"
SIZES = dict(
    vocab_size=128, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=64, max_position_embeddings=512, pad_token_id=0, eos_token_id=None,
    bos_token_id=None, attention_dropout=0.0,
)  # fmt: skip
WINDOWS = dict(layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=16)
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma": {},
    "gemma2": WINDOWS,
    "gemma3_text": WINDOWS,
    "granite": dict(residual_multiplier=0.3),
    "llama": {},
    "ministral": WINDOWS,
    "mistral": dict(sliding_window=16),
    "olmo2": {},
    "olmo3": WINDOWS,
    "qwen2": {},
    "qwen3": {},
    "smollm3": {},
}
BATCH, PROMPT, ANSWER, LATENT, NEW = 2, 16, 4, 16, 32
TOLERANCE = 1e-4


def model_of(family: str, **sizes) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **SIZES | FAMILIES[family] | sizes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = None
    return get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))


def with_own_modules(system: MultiAgentSystem) -> MultiAgentSystem:
    """The system, its layers run as transformers has them; everything else stays as it is."""
    for module in system.modules():
        if isinstance(module, FusedLayer):
            kinds = type(module).__mro__
            module.__class__ = kinds[kinds.index(FusedLayer) + 1]
    return system


def step(system: MultiAgentSystem) -> Tensor:
    """Loss and gradients of two agents' step, as one vector."""
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, 128, (BATCH * PROMPT,), generator=generator) for _ in range(2)]
    answer = torch.randint(0, 128, (BATCH * ANSWER,), generator=generator)
    system.zero_grad(set_to_none=True)
    loss = system(ids, [[PROMPT] * BATCH] * 2, answer, [ANSWER] * BATCH, return_logits=False).loss
    loss.backward()
    return torch.cat([loss.detach()[None], *(p.grad.flatten() for p in system.parameters() if p.grad is not None)])


def decode(system: MultiAgentSystem) -> Tensor:
    """Tokens of one agent's answers."""
    ids = torch.arange(BATCH * PROMPT) % 128
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    decoding = Decoding(max_new_tokens=NEW, temperature=0.0)
    answers = system.generate([ids], [[PROMPT] * BATCH], tokenizer, decoding)
    return torch.tensor([samples[0].tokens for samples in answers]).float()


def systems_of(family: str, topology: str, **sizes) -> list[MultiAgentSystem]:
    """As it is, and with its layers' own modules."""
    made = [
        MultiAgentSystem(copy.deepcopy(model), TOPOLOGIES[topology], latent_steps=LATENT)
        for model in [model_of(family, **sizes)] * 2
    ]
    return [made[0], with_own_modules(made[1])]


def race(run: Callable[[MultiAgentSystem], Tensor], systems: list[MultiAgentSystem], laps: int) -> dict[str, float]:
    """The fastest lap of each; raises `WrongResult` where they do not come to the same."""
    fused, own = (run(system) for system in systems)
    if not (error := relative_error(fused, own)) <= TOLERANCE:
        raise WrongResult(f"{run.__name__}: relative difference {error:.1e}")
    seconds: list[list[float]] = [[], []]
    for _ in range(laps):
        for system, found in zip(systems, seconds, strict=True):
            gc.collect()
            begin = time.process_time()
            run(system)
            found.append(time.process_time() - begin)
    fastest, own_fastest = map(min, seconds)
    return {"fused_s": fastest, "own_s": own_fastest, "error": error}


def measure(family: str, laps: int, **sizes) -> dict[str, Any]:
    return {
        "step": race(step, systems_of(family, "relay", **sizes), laps),
        "decoding": race(decode, systems_of(family, "single", **sizes), laps),
    }


def table(results: dict[str, Any]) -> str:
    lines = ["| model type | a step | layers' own modules | faster | decoding | layers' own modules | faster |"]
    lines += ["|---|--:|--:|--:|--:|--:|--:|"]
    for family, found in results["families"].items():
        cells = [
            f"{1e3 * r['fused_s']:.0f} ms | {1e3 * r['own_s']:.0f} ms | {r['own_s'] / r['fused_s']:.2f} ×"
            for r in (found["step"], found["decoding"])
        ]
        lines.append(f"| `{family}` | " + " | ".join(cells) + " |")
    of = results["machine"]
    lines += [
        "",
        f"4 layers, hidden size 256, LoRA, float32; {BATCH} rows. A step: two agents, prompts of {PROMPT} tokens, "
        f"{LATENT} latent steps; decoding: {NEW} tokens a row. Fastest of {results['laps']} laps, in turn, in "
        f"processor time. {of['device']}, 1 thread, torch {of['torch']}, transformers {of['transformers']}. Made by "
        "`python -m benchmarks.layers`.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.layers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--render-only", action="store_true", help="only rewrite the page from kept results")
    parser.add_argument("--laps", type=int, default=30, help="of each (default: %(default)s)")
    args = parser.parse_args()
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    if not args.render_only:
        torch.set_num_threads(1)
        families = {family: measure(family, args.laps) for family in track(FAMILIES, "measuring")}
        results = {"machine": machine(), "laps": args.laps, "families": families}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table(json.loads(RESULTS.read_text()))}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
