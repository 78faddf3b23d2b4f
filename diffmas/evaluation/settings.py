"""What an evaluation, of a run or of several methods, can be told."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from diffmas.agents.controls import CONTROLS
from diffmas.evaluation.evaluator import LABELS
from diffmas.evaluation.methods import METHODS, MODES
from diffmas.serving.options import ENGINES, OWN, check_engine

#: Arguments that say something only without, or only with, `--methods`.
WITHOUT_METHODS = ("variants", "seed")
WITH_METHODS = ("tasks", "seeds", "controls", "samples", "task_config")


@dataclass
class EvalArguments:
    """What to evaluate; what is left out is as in the run."""

    run: str = field(metadata={"help": "Folder written by diffmas.train; with --methods, one to be made will do."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Where results go; default: RUN/eval, with --methods RUN/methods or a new RUN."}
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={"aliases": ["--model"], "help": "The run's base model, where its folder has moved."},
    )
    gguf_file: str | None = field(
        default=None, metadata={"help": "The model's file in that folder or repository, where it is in GGUF."}
    )
    task: str | None = field(
        default=None,
        metadata={"help": "The task's .jsonl file, where it has moved; of a run made in Python, its task."},
    )
    variants: str | None = field(
        default=None, metadata={"help": f"Any of {', '.join(LABELS)}; default: all that say something about the run."}
    )
    batch_size: int = field(default=64, metadata={"help": "Rows decoded together."})
    seed: int = field(default=0, metadata={"help": "Of sampling and of the noise control."})
    eval_size: int | None = field(default=None, metadata={"help": "Evaluate on the first so many items only."})
    eval_file: str | None = field(
        default=None, metadata={"help": "JSONL file to evaluate on instead, where the task is one."}
    )
    data_dir: str | None = field(default=None, metadata={"help": "Folder with the task's files."})
    max_new_tokens: int | None = field(default=None, metadata={"help": "Longest answer."})
    temperature: float | None = field(default=None, metadata={"help": "Sampling temperature; 0 is greedy."})
    top_p: float | None = field(default=None, metadata={"help": "Nucleus of sampling."})
    disable_tqdm: bool = field(default=False, metadata={"help": "No progress bar."})
    methods: str | None = field(default=None, metadata={"help": f"all, or any of {', '.join(METHODS | MODES)}."})
    tasks: str | None = field(default=None, metadata={"help": "Tasks to compare methods on; default: the run's."})
    seeds: str | None = field(
        default=None,
        metadata={"help": "Seeds of training and sampling to compare methods over; default: the run's own, or 0."},
    )
    controls: str = field(default=",".join(CONTROLS), metadata={"help": f"Any of {', '.join(CONTROLS)}."})
    samples: int = field(default=1, metadata={"help": "Answers an item, when comparing methods."})
    max_message_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Longest text between agents, who are then evaluated talking in text too; default: max_new_tokens."
        },
    )
    engine: str = field(
        default=OWN, metadata={"help": f"What decodes the answers: {', '.join(ENGINES)}; senders run here in any case."}
    )
    engine_args: str | None = field(
        default=None, metadata={"help": "With vllm: further arguments of its engine, a JSON object."}
    )
    trace_dir: str | None = field(
        default=None,
        metadata={"help": "With vllm: where traces wait for it, e.g. /dev/shm; default: the folder of results."},
    )
    max_trace_gb: float | None = field(
        default=None, metadata={"help": "With vllm: the most that traces may take; default: what there is."}
    )
    task_config: str | None = field(
        default=None, metadata={"help": "YAML file {task: {flag: value}} of what differs between tasks."}
    )

    def check_used(self) -> None:
        """Raise `ValueError` for an argument that would be ignored."""
        names, how = (WITH_METHODS, "with") if self.methods is None else (WITHOUT_METHODS, "without")
        for f in fields(self):
            if f.name in names and (value := getattr(self, f.name)) != f.default:
                raise ValueError(f"{f.name} is {value!r}; allowed: only {how} --methods")
        check_engine(self.engine, self.engine_args, self.trace_dir, self.max_trace_gb)
