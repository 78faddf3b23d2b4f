"""What `test_distributed.py` has two processes do; started by torchrun, each result goes to a file of the folder given.

One pair of processes does all of it: starting them costs more than the work.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from tiny_models import VOCAB, arguments, causal_lm, ragged, with_lora
from transformers import GptOssConfig, GptOssForCausalLM, TrainerCallback

from diffmas import eval as evaluate
from diffmas import train
from diffmas.agents.topology import Agent, Topology
from diffmas.support.distributed import is_sharded, process, processes, settle_sharding, whole
from diffmas.system import MultiAgentSystem
from diffmas.training.settings import TrainArguments
from diffmas.training.trainer import SystemTrainer

CHAIN = {"a": (), "b": ("a",), "c": ("b",)}
FORK = {"a": (), "b": (), "c": ("b", "a")}
#: Topology, and options of the system.
CASES = {
    "chain": (CHAIN, dict(latent_steps=2, alignment="learned", checkpointing="all")),
    "plain": (CHAIN, dict(latent_steps=3)),
    "fork": (FORK, dict(latent_steps=1, alignment="learned", checkpointing="prefill")),
    "sweeps": (CHAIN, dict(latent_steps=3, alignment="learned", checkpointing="all", latent_backward="sweeps:2")),
    "soft": (
        FORK,
        dict(latent_steps=2, alignment="soft", alignment_temperature_learned=True, latent_grad_clip=0.9),
    ),
    "adapters": (CHAIN, dict(latent_steps=2, checkpointing="all")),
    "bridges": (FORK, dict(latent_steps=2, alignment="learned", checkpointing="all", bridge="mlp")),
    # An agent in the middle runs on another model.
    "models": (CHAIN, dict(latent_steps=2, alignment="learned", checkpointing="all", bridge_initial="random")),
    "detached bridges": (CHAIN, dict(latent_steps=2, detach_trace=True)),
    "no steps": (CHAIN, dict(latent_steps=0, alignment="learned")),
    "detached": (FORK, dict(latent_steps=2, alignment="learned", detach_trace=True)),
    # Layers with windows, sinks and experts.
    "windows": (FORK, dict(latent_steps=2, checkpointing="prefill")),
}
ROWS = 8


def windows():
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1, sliding_window=5, initializer_range=0.3,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4}, tie_word_embeddings=True,
    )  # fmt: skip
    model = GptOssForCausalLM(config).double()
    model.config._experts_implementation = "eager"
    return model


class Gradients(TrainerCallback):
    """Keeps what the optimizer is about to see."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.of = {n: whole(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None}


def gradients_of_a_step(case: str, folder: Path, *, sharded: bool = False) -> dict[str, torch.Tensor]:
    """Gradients of one optimizer step over 8 rows in two micro-batches, whatever the number of processes."""
    agents, options = CASES[case]
    # transformers' norms are not exact in float64 and the tests' are not fused; embeddings are tied.
    model = windows() if case == "windows" else causal_lm("qwen3", tied=True)
    adapters = "per_role" if case == "adapters" else "shared"
    other = "other" if case == "models" else ""
    topology = Topology(
        case,
        tuple(Agent(*item, model=other if item[0] == "b" else "") for item in agents.items()),
        {"models": ""}.get(case, "bridge" if "bridges" in case else "full"),
        adapters=adapters,
        models={other: {}} if other else {},
    )
    model = with_lora(model, embeddings=False, adapters=topology.adapter_names[1:])
    if other:
        narrow = causal_lm("llama", tied=True, hidden_size=24, num_attention_heads=3, num_key_value_heads=1)
        model = {"default": model, other: with_lora(narrow, embeddings=False)}
    prompts, answers = ragged(list(agents), ROWS)
    rows = [{"prompts": {n: p[i] for n, p in prompts.items()}, "answer": a} for i, a in enumerate(answers)]
    names = ("prompt_ids", "prompt_lengths", "answer_ids", "answer_lengths")
    kept = Gradients()
    args = TrainArguments(
        output_dir=str(folder), max_steps=1, per_device_train_batch_size=4 // processes(),
        gradient_accumulation_steps=2, max_grad_norm=0, save_strategy="no", disable_tqdm=True,
        remove_unused_columns=False, dataloader_pin_memory=False, fsdp=sharded or None,
    )  # fmt: skip
    settle_sharding(args)
    trainer = SystemTrainer(
        model=MultiAgentSystem(model, topology, **options),
        args=args,
        train_dataset=rows,
        data_collator=lambda batch: dict(
            zip(
                names,
                arguments({n: [r["prompts"][n] for r in batch] for n in agents}, [r["answer"] for r in batch]),
                strict=True,
            )
        ),
        callbacks=[kept],
    )
    trainer.train()
    assert is_sharded(trainer.model) == sharded
    return kept.of


def lose_a_number(step: int, kind: str, folder: Path, flags: list[str]) -> None:
    """Process 1 finds a loss that is NaN in the second micro-batch of `step`; what each process says goes to a file."""
    compute, seen = SystemTrainer.compute_loss, []

    def spoiled(self, *args, **kwargs):
        loss = compute(self, *args, **kwargs)
        seen.append(loss)
        return loss * torch.nan if process() == 1 and len(seen) == 2 * step else loss

    fresh()
    said = io.StringIO()
    SystemTrainer.compute_loss = spoiled
    try:
        with contextlib.redirect_stderr(said):
            status = train.main([*flags, f"--output_dir={folder / kind}-nan", "--save_steps=1"])
    finally:
        SystemTrainer.compute_loss = compute
    Path(folder, f"{kind}-nan-{process()}.txt").write_text(f"{status} {said.getvalue().splitlines()[-1]}")


def fresh() -> None:
    """Forget the flags of the run before."""
    AcceleratorState._reset_state(True)
    for name in (
        "ACCELERATE_USE_FSDP", "FSDP_VERSION", "FSDP_AUTO_WRAP_POLICY", "FSDP_CPU_RAM_EFFICIENT_LOADING",
        "FSDP_RESHARD_AFTER_FORWARD",
    ):  # fmt: skip
        os.environ.pop(name, None)


def main(folder: Path, flags: list[str]) -> None:
    def run(*more: str) -> None:
        fresh()
        status = train.main([*flags, *more])
        assert status == 0, status

    for case in CASES:
        for kind in ("ddp", "fsdp"):
            fresh()
            found = gradients_of_a_step(case, folder / "unused", sharded=kind == "fsdp")
            if int(os.environ["RANK"]) == 0:
                torch.save(found, folder / f"{case} {kind}.pt")
    for kind in ("ddp", "fsdp"):
        sharding = ["--fsdp"] if kind == "fsdp" else []
        run(f"--output_dir={folder / kind}", *sharding)
        resume = f"--resume_from_checkpoint={folder / kind / 'checkpoint-2'}"
        run(f"--output_dir={folder / kind}-resumed", resume, *sharding, "--disable_final_eval=True")
        resume = f"--resume_from_checkpoint={folder / 'single' / 'checkpoint-2'}"
        run(f"--output_dir={folder / kind}-from-single", resume, *sharding, "--disable_final_eval=True")
        lose_a_number(3, kind, folder, [*flags, *sharding])
    run(
        f"--output_dir={folder / 'ddp'}-flags", "--disable_final_eval=True", "--ddp_bucket_cap_mb=1",
        "--ddp_broadcast_buffers=True", "--ddp_find_unused_parameters=False",
        "--ddp_backend=gloo", "--ddp_timeout=60",
    )  # fmt: skip
    kept = '--fsdp_config={"reshard_after_forward": false}'
    run(f"--output_dir={folder / 'fsdp'}-flags", "--disable_final_eval=True", "--fsdp", kept)
    # As `accelerate launch --use_fsdp --fsdp_version 2` asks for it.
    fresh()
    os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_RESHARD_AFTER_FORWARD="true")
    assert train.main([*flags, f"--output_dir={folder / 'fsdp'}-launched", "--disable_final_eval=True"]) == 0
    fresh()
    assert evaluate.main([f"--run={folder / 'single'}", "--batch_size=2", "--disable_tqdm"]) == 0
    fresh()
    # Refused by the first process, reported by both.
    assert train.main([*flags, f"--output_dir={folder / 'ddp'}"]) == 2


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
