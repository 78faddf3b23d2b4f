"""transformers' Trainer on a multi-agent system: what is checkpointed, how the loss is scaled, how it stops."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerState

from diffmas.agents.collator import Collator
from diffmas.evaluation.evaluator import Evaluator
from diffmas.evaluation.needs import check_prompts, roles_of
from diffmas.runs.files import METRICS_FILE
from diffmas.runs.metrics import RESTATING_LOSS, read_metrics
from diffmas.runs.weights import load_weights, save_weights
from diffmas.support.atomic import write_atomically
from diffmas.support.distributed import any_process, process, processes
from diffmas.support.failures import out_of_memory, writing
from diffmas.support.not_finite import FiniteSteps
from diffmas.support.progress import announced
from diffmas.support.quiet import quiet_checkpoints
from diffmas.support.valid_json import to_json
from diffmas.system import MultiAgentSystem
from diffmas.tasks import Task
from diffmas.tasks.jsonl import task_of
from diffmas.training.batching import ItemLengths, LengthGrouped
from diffmas.training.checkpoints import (
    OPTIMIZER_FILE,
    SCHEDULER_FILE,
    STAGING,
    STATE_FILE,
    checkpoint_path,
    keep_settings,
    put_in_place,
    read_state,
    rotate,
)
from diffmas.training.restating import SAID, LogAtItsEnd, RestatingCollator, check_restating
from diffmas.training.settings import TrainArguments

#: Of an optimizer's options, those that the schedule sets, and its parameters.
_BY_SCHEDULE = ("params", "lr", "initial_lr")


class Items(Dataset):
    """A task's items as a map-style dataset."""

    def __init__(self, items):
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self._items[index])


def raise_learning_rates(optimizer: torch.optim.Optimizer, model: nn.Module, ratio: float) -> None:
    """Take LoRA's B matrices out of the optimizer's groups into groups of `ratio` times the learning rate (LoRA+)."""
    raised = {id(p) for name, p in model.named_parameters() if ".lora_B." in name or ".lora_embedding_B." in name}
    groups = []
    for group in optimizer.param_groups:
        parts = [[p for p in group["params"] if (id(p) in raised) == wanted] for wanted in (False, True)]
        rates = (group["lr"], ratio * group["lr"])
        groups += [{**group, "params": part, "lr": rate} for part, rate in zip(parts, rates, strict=True) if part]
    optimizer.param_groups = groups


class SystemTrainer(Trainer):
    """Trains a :class:`~diffmas.system.MultiAgentSystem`; evaluates by generating answers.

    Used like transformers' Trainer:

        trainer = SystemTrainer(system, TrainArguments(output_dir="runs/mine"), train_dataset=items, eval_dataset=more)
        trainer.train()
        trainer.save_model()  # for MultiAgentSystem.from_pretrained("runs/mine")

    Items are mappings with the fields that the agents' prompts name, and the `answer` to train on.

    Args:
        model: the system. args: of the training.
        data_collator: default: the system's own.
        evaluator: default: answers `eval_dataset` and checks it by `checker` (see
            :class:`~diffmas.tasks.base.TaskArguments`; default: chosen from its right answers).
        lengths: of training items, for batches of alike lengths; default: counted.

    Raises:
        TypeError: other arguments than :class:`TrainArguments`, which checks them.
        ValueError: a system without an adapter, no item, or one that a prompt or the checker cannot use.

    Checkpoints hold the adapter (and a learned alignment), not the base model; the optimizer's state is stored whole
    and by parameter, so that another number of processes, sharded or not, can resume. With gradient accumulation
    and several processes, every answer token weighs the same.
    """

    def __init__(
        self,
        model: MultiAgentSystem,
        args: TrainArguments,
        data_collator: Collator | None = None,
        train_dataset: Dataset | Sequence[Mapping[str, Any]] | None = None,
        eval_dataset: Dataset | Sequence[Mapping[str, Any]] | None = None,
        *,
        evaluator: Evaluator | None = None,
        checker: str | None = None,
        lengths: ItemLengths | None = None,
        **kwargs,
    ):
        if not isinstance(args, TrainArguments):
            raise TypeError(f"args is {type(args).__name__}; allowed: diffmas.TrainArguments")
        if args.output_dir is None:
            raise ValueError("output_dir is None; allowed: a folder")
        if args.ddp_find_unused_parameters is None:
            # Searching the graph of a whole trajectory is only worth it where there is something to find.
            args.ddp_find_unused_parameters = model.has_unreached_parameters
        args.remove_unused_columns = False
        args.dataloader_pin_memory &= torch.cuda.is_available()
        model.check_adapter()
        model.choose_trained()
        model.check_trains()
        collate = data_collator or model.collator
        if data_collator is None:
            task = _task(model, train_dataset, eval_dataset if evaluator is None else None, checker)
            if not getattr(train_dataset, "drawn", False):
                train_dataset = None if train_dataset is None else Items(task.train)
            if evaluator is None and eval_dataset is not None:
                evaluator = _evaluator(model, task, args)
                eval_dataset = Items(task.eval)
        if lengths is None and args.train_sampling_strategy == "group_by_length":
            lengths = ItemLengths(train_dataset, collate)
        if args.restate_steps:
            check_restating(model.topology, args.restate_steps)
            collate = RestatingCollator(collate, collate if isinstance(collate, Collator) else model.collator)
            # Of what only the method's loss reaches, the other one leaves no gradient.
            args.ddp_find_unused_parameters = True
        quiet_checkpoints()
        super().__init__(
            model, args, data_collator=collate, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs
        )
        self.lengths = lengths
        self.evaluator = evaluator
        self.finite = FiniteSteps()
        self._saving_to: str | None = None
        self.add_callback(self.finite)
        self.add_callback(StateInPlace())
        self.add_callback(LogAtItsEnd())
        self.model_accepts_loss_kwargs = True

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        there, optimizer = self.optimizer, super().create_optimizer(model)
        if there is None and self.args.loraplus_lr_ratio != 1:
            trained = self.accelerator.unwrap_model(model or self.model)
            raise_learning_rates(optimizer, trained, self.args.loraplus_lr_ratio)
        return optimizer

    def _get_train_sampler(self, train_dataset: Dataset | None = None):
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGrouped(self.lengths.totals, size, seed)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch=None) -> torch.Tensor:
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
            self.finite.add(loss)
            return loss
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            rows = len(inputs["prompt_lengths"][0])
            raise torch.OutOfMemoryError(
                f"a micro-batch of {rows} rows does not fit into memory; try --auto_batch, --checkpointing auto, or a "
                f"smaller --per_device_train_batch_size. {error}"
            ) from error

    def _get_grad_norm(self, model: nn.Module, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.finite.check_gradients(norm, self.state.global_step + 1, self.args.device)
        return norm

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.args.restate_steps and self.state.global_step >= self.args.restate_steps:
            batches = [{name: value for name, value in batch.items() if name not in SAID} for batch in batches]
        scored = (batch.get("said_lengths", [batch["answer_lengths"]]) for batch in batches)
        count = torch.tensor(sum(sum(lengths) for texts in scored for lengths in texts), device=device)
        if self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()
        return batches, count

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs=False, num_items_in_batch=None):
        output = model(**inputs, num_items_in_batch=num_items_in_batch, return_logits=False)
        # Gradients are averaged over processes, the count is summed over them.
        loss = output.loss * (self.args.world_size if num_items_in_batch is not None else 1)
        return (loss, output) if return_outputs else loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs and self.state.global_step <= self.args.restate_steps:
            logs = {(RESTATING_LOSS if name == "loss" else name): value for name, value in logs.items()}
        super().log(logs, *args, **kwargs)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        items = self.eval_dataset if eval_dataset is None else eval_dataset
        if items is None or len(items) == 0:
            raise ValueError("eval_dataset is empty; allowed: at least one item to evaluate on")
        if self.evaluator is None:
            task = _task(self.model, None, items, None)
            self.evaluator, items = _evaluator(self.model, task, self.args), Items(task.eval)
        with announced(f"evaluating {len(items)} items", show=process() == 0):
            records = self.evaluator.run("matched", [items[i] for i in range(len(items))])
        metrics = {f"{metric_key_prefix}_accuracy": sum(r.correct for r in records) / len(records)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        system = self.accelerator.unwrap_model(self.model)
        if _internal_call:
            save_weights(system, folder)
        else:
            system.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_weights(self.accelerator.unwrap_model(model or self.model), resume_from_checkpoint)

    def _determine_best_metric(self, metrics: dict[str, float], trial) -> bool:
        # The best is one of the checkpoints: what is evaluated between two of them cannot be loaded again.
        # What Ctrl-C alone saves is none of those of the whole training, though it has to be saved.
        unplanned = getattr(self.control, "unplanned_save", False)
        if self.args.save_strategy != "best" and (unplanned or not self.control.should_save):
            return False
        return super()._determine_best_metric(metrics, trial) or unplanned

    def _load_best_model(self) -> None:
        load_weights(self.accelerator.unwrap_model(self.model), self.state.best_model_checkpoint)

    def finish_from(self, checkpoint: str | Path) -> None:
        """What :meth:`train` leaves behind when `checkpoint`, of the last step, is all there is to do."""
        self.state = read_state(checkpoint)
        self.state.is_world_process_zero = self.is_world_process_zero()
        find_best(self.state, self.args)
        load_weights(self.accelerator.unwrap_model(self.model), checkpoint)
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint:
            self._load_best_model()

    def _get_output_dir(self, trial) -> str:
        return self._saving_to or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        run, step = self.args.output_dir, self.state.global_step
        staging = Path(run, STAGING)
        self._saving_to = str(staging)
        try:
            with writing(checkpoint_path(run, step)):
                super()._save_checkpoint(model, trial)
        finally:
            self._saving_to = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            best = self.state.best_global_step
            if best:
                # The Trainer wrote it with the place where it was staged.
                self.state.best_model_checkpoint = str(checkpoint_path(run, best))
                self.state.save_to_json(str(checkpoint_path(staging, step) / STATE_FILE))
            keep_settings(run, checkpoint_path(staging, step))
            put_in_place(checkpoint_path(staging, step), run)
            rotate(run, self.args.save_total_limit, best)
        self.accelerator.wait_for_everyone()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_optimizer_state_dict(self.model, self.optimizer, options=options)
        if self.args.should_save:
            torch.save(state, Path(output_dir, OPTIMIZER_FILE))
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state, schedule = (
            torch.load(Path(checkpoint, file), map_location="cpu", weights_only=True)
            for file in (OPTIMIZER_FILE, SCHEDULER_FILE)
        )
        asked = [{k: v for k, v in group.items() if k not in _BY_SCHEDULE} for group in self.optimizer.param_groups]
        rates = getattr(self.lr_scheduler, "base_lrs", None)
        if state["state"]:
            options = StateDictOptions(full_state_dict=True, strict=False)
            set_optimizer_state_dict(self.model, self.optimizer, state, options=options)
            for name, parameter in self.accelerator.unwrap_model(self.model).named_parameters():
                if name not in state["state"]:
                    # It had had no gradient yet; torch gives it the state of a step without one.
                    self.optimizer.state.pop(parameter, None)
        else:
            # Plain SGD has nothing but its learning rate, which torch cannot load without a tensor beside it.
            for group, kept in zip(self.optimizer.param_groups, state["param_groups"], strict=True):
                group.update({name: value for name, value in kept.items() if name != "params"})
        self.lr_scheduler.load_state_dict(schedule)
        # What is asked for now holds, not what the checkpoint was written with.
        for group, options in zip(self.optimizer.param_groups, asked, strict=True):
            group.update(options)
        if isinstance(self.lr_scheduler, LambdaLR):
            self.lr_scheduler.base_lrs = rates
            for group, rate, factor in zip(
                self.optimizer.param_groups, rates, self.lr_scheduler.lr_lambdas, strict=True
            ):
                group.update(initial_lr=rate, lr=rate * factor(self.lr_scheduler.last_epoch))
            self.lr_scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]


def _task(system: MultiAgentSystem, train: Any, evaluation: Any, checker: str | None) -> Task | None:
    """Items as the checker and every agent's prompt need them; those that are drawn are left alone."""
    listed = [[] if found is None or getattr(found, "drawn", False) else [found[i] for i in range(len(found))]
              for found in (train, evaluation)]  # fmt: skip
    if train is not None and len(train) == 0:
        raise ValueError("train_dataset is empty; allowed: at least one item")
    if not any(listed):
        return None
    task = task_of(*listed, system.prompts, checker)
    check_prompts(task, roles_of(system.topology), training=True)
    return task


def _evaluator(system: MultiAgentSystem, task: Task, args: TrainArguments) -> Evaluator:
    return Evaluator(system, system.tokenizer, task, system.decoding, batch_size=args.per_device_eval_batch_size)


class StateInPlace(TrainerCallback):
    """A checkpoint's state, where and as the training now goes on: its best checkpoint, its steps.

    Logging, evaluating and saving are done as often as is asked for now.
    """

    def on_train_begin(self, args: TrainingArguments, state, control, **kwargs):
        state.compute_steps(args, state.max_steps)
        find_best(state, args)


def find_best(state: TrainerState, args: TrainingArguments) -> None:
    """Set a loaded state's path of the best checkpoint by its step: the run's folder may have moved since.

    Raises:
        FileNotFoundError: it is not there, and `load_best_model_at_end` needs it.
    """
    if not state.best_global_step:
        return
    best = checkpoint_path(args.output_dir, state.best_global_step)
    if args.load_best_model_at_end and not best.is_dir():
        raise FileNotFoundError(f"load_best_model_at_end is True, and the best checkpoint so far, {best}, is missing")
    state.best_model_checkpoint = str(best)


class MetricsFile(TrainerCallback):
    """Appends what the Trainer logs to `metrics.jsonl`; a resumed run drops what came after its checkpoint.

    `more`: gives what else an entry with a training loss tells.
    """

    def __init__(self, more: Callable[[], dict[str, Any]] = dict):
        self._more = more

    def on_train_begin(self, args: TrainingArguments, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        path = Path(args.output_dir, METRICS_FILE)
        kept = [e for e in read_metrics(path) if e["step"] <= state.global_step] if state.global_step else []
        write_atomically(path, "".join(to_json(entry) + "\n" for entry in kept))

    def on_log(self, args: TrainingArguments, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            path = Path(args.output_dir, METRICS_FILE)
            with writing(path), path.open("a") as file:
                more = self._more() if "loss" in logs else {}
                file.write(to_json({"step": state.global_step, **logs, **more}) + "\n")


class StopOnInterrupt(TrainerCallback):
    """On Ctrl-C, finish the step, save a checkpoint and stop; on a second one, stop at once.

    An evaluation that is due at this step belongs to it: schedules and the best checkpoint follow from it.

    Several processes stop after the same step. Their launcher passes on the Ctrl-C that the terminal has sent them
    already, so there a second one is ignored; the launcher itself ends processes that take too long.
    """

    def __init__(self):
        self.interrupted = False

    def on_train_begin(self, args, state, control, **kwargs):
        self._previous = signal.signal(signal.SIGINT, self._remember)

    def on_train_end(self, args, state, control, **kwargs):
        signal.signal(signal.SIGINT, self._previous)

    def on_step_end(self, args, state, control, **kwargs):
        self.interrupted = any_process(self.interrupted, args.device)
        if self.interrupted:
            control.unplanned_save = not control.should_save
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.interrupted:
            # Trainer ends the epoch wherever it stops; only at its true end is anything due.
            due = float(state.epoch).is_integer()
            control.unplanned_save = not (due and control.should_save)
            control.should_evaluate &= due
            control.should_save = due and (control.should_evaluate or control.should_save)

    def _remember(self, number, frame):
        self.interrupted = True
        if processes() == 1:
            signal.signal(signal.SIGINT, self._previous)
            print("\ninterrupted: saving a checkpoint after this step (Ctrl-C again stops at once)", flush=True)
        elif process() == 0:
            print("\ninterrupted: saving a checkpoint after this step", flush=True)
