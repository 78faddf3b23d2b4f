"""Settings of a training and of its evaluation, as flags."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

from transformers import TrainingArguments

from diffmas.evaluation.evaluator import check_message_tokens
from diffmas.support.launch import check_processes, settle_processes
from diffmas.training.rules import settle, settle_updates


@dataclass
class DecodingArguments:
    """How answers are generated when evaluating."""

    max_new_tokens: int | None = field(
        default=None, metadata={"help": "Longest answer; default: 2048, or 32768 where the chat template thinks."}
    )
    temperature: float = field(default=0.6, metadata={"help": "Sampling temperature; 0 is greedy."})
    top_p: float = field(default=0.95, metadata={"help": "Nucleus of sampling."})


@dataclass
class TrainArguments(TrainingArguments):
    """transformers' training arguments, with an output folder named after the task by default."""

    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for adapter, system.json, metrics and report; default: runs/<task>."}
    )
    report_to: str = field(default="none", metadata={"help": "Trackers, e.g. tensorboard or tensorboard,wandb."})
    liger_kernel_config: dict | str | None = field(
        default=None, metadata={"help": 'Model parts that use_liger_kernel fuses, e.g. {"rope": false}.'}
    )
    auto_batch: bool = field(
        default=False,
        metadata={
            "help": "Take the largest micro-batch the memory allows; micro-batch × accumulation stays as asked for."
        },
    )
    memory_limit_gb: float | None = field(
        default=None,
        metadata={
            "help": "What auto_batch and checkpointing auto may use, in 10⁹ bytes; default: 90 %% of what is free."
        },
    )
    loraplus_lr_ratio: float = field(
        default=1.0,
        metadata={
            "help": "Learning rate of LoRA's B matrices over that of all else (LoRA+, arXiv 2402.12354); 1: the same."
        },
    )
    restate_steps: int = field(
        default=0,
        metadata={
            "help": "First steps of a training, in which every agent before the last learns to say in text what its "
            "prompt tells it, instead of the method's loss."
        },
    )
    profile: bool = field(
        default=False, metadata={"help": "Time the second step by phase and trace the third: profile.json, trace.json."}
    )
    disable_final_eval: bool = field(
        default=False, metadata={"help": "Stop after training, without the evaluation of all variants."}
    )
    max_message_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Evaluate agents that talk in text too, without the adapter, in messages of at most so many tokens."
        },
    )

    def __post_init__(self):
        #: As they were given, for a run that goes on later.
        self.given = {f.name: getattr(self, f.name) for f in fields(self)}
        check_message_tokens(self.max_message_tokens)
        if not 0 < self.loraplus_lr_ratio < math.inf:
            raise ValueError(f"loraplus_lr_ratio is {self.loraplus_lr_ratio}; allowed: above 0 and finite")
        if self.restate_steps < 0:
            raise ValueError(f"restate_steps is {self.restate_steps}; allowed: integers ≥ 0")
        chosen = self.output_dir
        settle(self)
        settle_processes(self)
        super().__post_init__()
        # transformers has filled in a folder of its own.
        self.output_dir = chosen
        # One process trains on one GPU: without a launcher, transformers would copy the model to all there are.
        self._n_gpu = min(self._n_gpu, 1)
        check_processes(self.world_size)
        settle_updates(self)
