"""Methods × tasks × seeds: trains what has to be trained, answers every item once, and goes on after a kill."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from diffmas.agents.scoring import restating_agents
from diffmas.agents.thinking import budget, switched
from diffmas.agents.topology import Topology
from diffmas.command_line import parse_training
from diffmas.comparison.summary import summarise
from diffmas.evaluation.answering import answer, evaluating, progress_bar
from diffmas.evaluation.deferred import Deferred
from diffmas.evaluation.methods.base import Method, TraceChannel
from diffmas.evaluation.needs import ONE_ITEM, check_prompts, method_left_out, method_roles, several
from diffmas.evaluation.records import Record, RecordFile
from diffmas.generation import Decoding
from diffmas.generation.received import batches
from diffmas.loading import build_system
from diffmas.models.alignment import AlignmentOptions
from diffmas.models.pretrained import load_tokenizer
from diffmas.prompts.dates import print_date, today
from diffmas.prompts.shortened import cut_line
from diffmas.runs.description import read_description
from diffmas.runs.files import ADAPTER_FILE, SUMMARY_FILE, SYSTEM_FILE, all_adapter_folders
from diffmas.runs.models import sources
from diffmas.runs.weights import load_weights
from diffmas.serving.options import OWN
from diffmas.support.atomic import write_atomically
from diffmas.support.lock import locked
from diffmas.support.machine import machine
from diffmas.support.valid_json import to_json
from diffmas.system import MultiAgentSystem
from diffmas.tasks import Task, load_task
from diffmas.tasks.content import fingerprints
from diffmas.training.session import train, weight_settings

ITEMS_FILE, SETTINGS_FILE, TRAININGS = "items.jsonl", "settings.json", "training"


class Interrupted(Exception):
    """Ctrl-C during a training, which has saved a checkpoint."""


@dataclass(frozen=True)
class Options:
    """How answers are taken, the same for every method.

    Args:
        samples: answers an item. `batch_size`: rows decoded together; at least 2, a mismatched trace is another row's.
        max_message_tokens: longest text of an agent before the last; None: as long as an answer may be.
        engine: what decodes: "diffmas", or "vllm", once all senders have run.
    """

    samples: int = 1
    batch_size: int = 64
    max_message_tokens: int | None = None
    engine: str = OWN

    def __post_init__(self):
        if self.batch_size < 2:
            raise ValueError(f"batch_size is {self.batch_size}; allowed: integers ≥ 2")
        for name in ("samples", "max_message_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}; allowed: integers ≥ 1")


class Settings:
    """One task's settings: what `diffmas.train` makes of its flags."""

    def __init__(self, flags: Sequence[str], prog: str):
        # Trainings of a comparison are not evaluated on the way: what needs that is refused before the first.
        self.flags = [*flags, "--eval_strategy=no"]
        self.system, self.task, self.decoding, training = parse_training(self.flags, prog)
        self.topology = self.system.load_topology()
        self.training = weight_settings(training)

    def load_task(self) -> Task:
        """The task, with the prompts that agents bring along."""
        task = load_task(self.task)
        return replace(task, prompts=task.prompts.with_roles(self.topology.prompts))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Of the model, before it is loaded."""
        source = sources(self.system, self.topology)[self.topology.model_names[0]]
        return load_tokenizer(source["model_name_or_path"], source["gguf_file"])

    def topology_of(self, method: Method) -> Topology:
        """The topology of a method.

        Raises:
            ValueError: one that thinks, or does not, on a model without a switch for that.
        """
        topology = method.topology(self.topology)
        return topology if method.thinking is None else switched(topology, self.tokenizer, method.thinking)

    def describe(self) -> dict[str, Any]:
        return {
            "system": asdict(self.system),
            "topology": self.topology.to_dict(),
            "task": asdict(self.task),
            "decoding": asdict(self.decoding),
            "training": self.training,
        }


class Comparison:
    """A folder of records, trained adapters and a summary; running it again adds what is missing.

    Args:
        folder: made where there is none.
        flags: by task, the flags that `python -m diffmas.train` would take for it (`--task` among them).
        methods, seeds, controls: what to evaluate; a seed is that of training, of sampling and of the noise control.
        adapters: folders of finished runs, by (task, method, seed), to take instead of training.
        narrate: told in a line what each method, seed and control came to, where nothing is deferred.
        defer: opens what answers wait in, where `options.engine` is "vllm".

    Raises:
        ValueError: settings other than those of the records that are there.
    """

    def __init__(
        self,
        folder: str | Path,
        flags: Mapping[str, Sequence[str]],
        methods: Sequence[Method],
        seeds: Sequence[int],
        controls: Sequence[str] = ("matched", "mismatched", "zero", "noise"),
        options: Options = Options(),
        *,
        adapters: Mapping[tuple[str, str, int], str | Path] | None = None,
        prog: str = "python -m diffmas.eval",
        show_progress: bool = True,
        narrate: Callable[[str], None] | None = None,
        defer: Callable[[], AbstractContextManager[Deferred]] | None = None,
    ):
        self.folder, self.methods, self.seeds, self.controls = Path(folder), methods, seeds, controls
        self.options, self.adapters, self.show_progress = options, dict(adapters or {}), show_progress
        self.narrate, self._defer = narrate, defer or nullcontext
        # Tasks whose date has been told.
        self._told: set[str] = set()
        self.settings = {name: Settings(f, prog) for name, f in flags.items()}
        self._pin_dates()
        self.tasks = {name: settings.load_task() for name, settings in self.settings.items()}
        self._settle_lengths()
        for name, task in self.tasks.items():
            if len(task.eval) == 0:
                raise ValueError(f"the evaluation set of {name} is empty; allowed: at least one item")
            for method in methods:
                if (reason := method_left_out(method, task, self.settings[name].topology)) is not None:
                    raise ValueError(f"method {method.name} does not apply to {name}: {reason}")
                self.settings[name].topology_of(method)
                roles = method_roles(method, self.settings[name].topology)
                check_prompts(task, roles, training=method.trained)
            if not several(task.eval) and any("mismatched" in method.controls for method in methods):
                print(f"{name}: no method is answered with another row's trace ({ONE_ITEM})", flush=True)
            task.ready()
        self.folder.mkdir(parents=True, exist_ok=True)

    def run(self) -> dict[str, Any]:
        """Train and answer what is missing; returns the summary, which is in the folder too.

        Raises:
            Interrupted: Ctrl-C during a training.
            BlockingIOError: another process is at work in the folder.
        """
        with locked(self.folder), RecordFile(self.folder / ITEMS_FILE) as file:
            self._check_settings(begun=bool(file.records) or (self.folder / TRAININGS).is_dir())
            with self._defer() as waiting, self._progress(file) as advance:
                for name, task in self.tasks.items():
                    for method in self.methods:
                        for seed in self.seeds:
                            self._evaluate(file, name, task, method, seed, advance, waiting)
                if waiting is not None:
                    waiting.decode(lambda count: advance("decoding on vLLM", count))
            for name, cut in self._cut(file.records).items():
                if line := cut_line(cut):
                    print(f"{name}: {line}")
            return self.summarise(file.records)

    def summarise(self, records: Sequence[Record]) -> dict[str, Any]:
        """Write `summary.json` from all records in the folder, those of earlier calls too."""
        names = list(dict.fromkeys([*(m.name for m in self.methods), *(r.method for r in records)]))
        summary = {
            **summarise(records, names),
            **({"cut": cut} if (cut := self._cut(records)) else {}),
            "machine": machine(),
            "settings": json.loads((self.folder / SETTINGS_FILE).read_text()),
        }
        write_atomically(self.folder / SUMMARY_FILE, to_json(summary, indent=2) + "\n")
        return summary

    def _cut(self, records: Sequence[Record]) -> dict[str, dict[str, int]]:
        """By task, what was cut of its items' prompts: of each item, by the method that lost most of it."""
        found = {}
        for name, settings in self.settings.items():
            if settings.task.max_prompt_tokens is not None:
                lost: dict[int, int] = {}
                for r in (r for r in records if r.task == name and r.cut_tokens):
                    lost[r.index] = max(r.cut_tokens, lost.get(r.index, 0))
                found[name] = {
                    "max_prompt_tokens": settings.task.max_prompt_tokens,
                    "items": len(lost),
                    "tokens": sum(lost.values()),
                }
        return found

    def _evaluate(
        self, file: RecordFile, name: str, task: Task, method: Method, seed: int, advance, waiting: Deferred | None
    ) -> None:
        decoding = self._decoding(name)
        # Records carry the name the task was asked for by, which two files of the same stem do not share.
        task = replace(task, name=name)
        loaded = None
        for control in (c for c in self._controls(name, method) if seed in self._seeds(name, method, c)):
            began, done = time.perf_counter(), len(file.records)
            for indices in batches(len(task.eval), self.options.batch_size):
                wanted = {(name, method.name, control, seed, i, s) for i in indices for s in range(decoding.samples)}
                if wanted <= file.keys:
                    continue
                loaded = loaded or self._load(name, task, method, seed)
                system, tokenizer, channel = loaded
                take = answer if waiting is None else partial(waiting.add, kept=file.append)
                with evaluating(system, adapter=method.trained):
                    found = take(
                        system, channel, task, tokenizer, decoding, indices,
                        method=method.name, control=control, seed=seed,
                    )  # fmt: skip
                file.append(found or [])
                advance(f"{name}: {method.name}, seed {seed}, {control}", 0 if waiting else len(wanted))
            if self.narrate is not None and (new := file.records[done:]):
                right, seconds = sum(r.correct for r in new) / len(new), time.perf_counter() - began
                self.narrate(f"{name}  {method.name}  seed {seed}  {control}: {100 * right:.1f} %  ({seconds:.1f} s)")

    def _load(self, name: str, task: Task, method: Method, seed: int):
        settings = self.settings[name]
        topology = settings.topology_of(method)
        if method.trained:
            folder = self.adapters.get((name, method.name, seed)) or self._train(name, method, seed, topology)
        system, tokenizer = build_system(self._system_args(method, settings), topology)
        if name not in self._told:
            print_date(tokenizer, settings.task.date)
            self._told.add(name)
        if method.trained:
            load_weights(system, folder)
        if torch.cuda.is_available():
            system.cuda()
        return system, tokenizer, self._channel(name, method, system, task, tokenizer)

    def _train(self, name: str, method: Method, seed: int, topology: Topology) -> Path:
        """The folder of the method's finished training; starts it, or goes on with it, where that is needed."""
        settings = self.settings[name]
        folder = self.folder / TRAININGS / _file_name(name) / _file_name(method.name) / f"seed-{seed}"
        if (folder / SUMMARY_FILE).is_file():
            return folder
        flags = [
            *settings.flags, f"--seed={seed}", "--disable_final_eval=true",
            f"--output_dir={folder}", f"--disable_tqdm={not self.show_progress}",
        ]  # fmt: skip
        if (folder / SYSTEM_FILE).is_file():
            flags.append(f"--resume_from_checkpoint={folder}")
        _, task_args, decoding_args, training_args = parse_training(flags)
        if not restating_agents(topology):
            # Of a single agent, say: what a task's settings ask of senders is not asked of it.
            training_args.restate_steps = 0
        status = train(
            self._system_args(method, settings), task_args, decoding_args, training_args, topology=topology,
            # Beside the methods and seeds of a task: what decides a text decides who shares it.
            collator=lambda *parts: self._channel(name, method, *parts).kept_in(folder.parents[1]),
        )  # fmt: skip
        if status:
            raise Interrupted
        return folder

    def _channel(self, name: str, method: Method, system: MultiAgentSystem, task: Task, tokenizer) -> TraceChannel:
        messages = self._decoding(name)
        if (longest := self.options.max_message_tokens) is not None:
            messages = replace(messages, max_new_tokens=longest)
        return method.channel(system, task, tokenizer, self.settings[name].topology, messages)

    def _decoding(self, name: str) -> Decoding:
        return Decoding(**asdict(self.settings[name].decoding), samples=self.options.samples)

    def _system_args(self, method: Method, settings: Settings):
        args = replace(settings.system, **method.settings)
        return args if method.trained else replace(args, **asdict(AlignmentOptions.of(args).untrained))

    def _controls(self, name: str, method: Method) -> list[str]:
        others = several(self.tasks[name].eval)
        return [c for c in method.controls if c in self.controls and (others or c != "mismatched")]

    def _pin_dates(self) -> None:
        """Where no date is given: that which the folder keeps for the task, or today's."""
        path = self.folder / SETTINGS_FILE
        tasks = json.loads(path.read_text()).get("tasks", {}) if path.is_file() else {}
        for name, settings in self.settings.items():
            if settings.task.date is None:
                date = tasks.get(name, {}).get("task", {}).get("date") or today()
                settings.flags.append(f"--date={date}")
                settings.task = replace(settings.task, date=date)

    def _settle_lengths(self) -> None:
        """Where the longest answer is not given: what suits the model."""
        for name, settings in self.settings.items():
            if settings.decoding.max_new_tokens is None:
                longest = budget(self.tasks[name].prompts, settings.topology, settings.tokenizer)
                settings.flags.append(f"--max_new_tokens={longest}")
                settings.decoding = replace(settings.decoding, max_new_tokens=longest)

    def _seeds(self, name: str, method: Method, control: str) -> Sequence[int]:
        """All seeds, or the first where every other one would repeat its answers: no training, greedy, no noise."""
        drawn = method.trained or control == "noise" or self.settings[name].decoding.temperature > 0
        return self.seeds if drawn else self.seeds[:1]

    def _check_settings(self, begun: bool) -> None:
        """Keep the settings beside the records, or raise `ValueError` where other ones are kept of what was begun."""
        path = self.folder / SETTINGS_FILE
        kept = json.loads(path.read_text()) if begun and path.is_file() else {}
        # By way of JSON, as they are read back.
        now = json.loads(json.dumps({"options": asdict(self.options)} | {
            "tasks": {name: settings.describe() for name, settings in self.settings.items()}
        }))  # fmt: skip
        # Before there was a choice of engines, it was ours.
        options = {"engine": OWN, **kept["options"]} if "options" in kept else {}
        before = {"options": options} | kept.get("tasks", {})
        for part, values in ({"options": now["options"]} | now["tasks"]).items():
            for key, value, was in changes(values, before.get(part, {})):
                raise ValueError(
                    f"{key} of {part} is {value!r}, but the records in {self.folder} had {was!r}; allowed: the same, "
                    "or another folder"
                )
        files: dict[str, dict[str, Any]] = {
            "items": {name: fingerprints(task) for name, task in self.tasks.items()},
            "adapters": {"/".join(map(str, k)): _digest(f) for k, f in self.adapters.items()},
        }
        for kind, found in files.items():
            for name, was in kept.get(kind, {}).items():
                if found.get(name, was) != was:
                    raise ValueError(
                        f"the {kind[:-1] if kind == 'adapters' else kind} of {name} changed since the records in "
                        f"{self.folder} were made; allowed: the same, or another folder"
                    )
        write_atomically(
            path,
            to_json(
                {"options": now["options"], "tasks": kept.get("tasks", {}) | now["tasks"]}
                | {kind: kept.get(kind, {}) | found for kind, found in files.items()},
                indent=2,
            )
            + "\n",
        )

    @contextmanager
    def _progress(self, file: RecordFile) -> Iterator[Any]:
        total = done = 0
        for name, task in self.tasks.items():
            for method in self.methods:
                cells = [(c, s) for c in self._controls(name, method) for s in self._seeds(name, method, c)]
                total += len(cells) * len(task.eval) * self.options.samples
                done += sum(1 for k in file.keys if (k[0], k[1]) == (name, method.name) and (k[2], k[3]) in cells)
        with progress_bar(self.show_progress) as progress:
            bar = progress.add_task("answering", total=total, completed=done)
            yield lambda what, n: progress.update(bar, description=what, advance=n)


def run_to_end(comparison: Comparison) -> dict[str, Any] | None:
    """The summary; None where Ctrl-C came first, which is said in a line."""
    try:
        return comparison.run()
    except (Interrupted, KeyboardInterrupt):
        print(f"stopped; the same command goes on where {comparison.folder} ends")
        return None


def _file_name(name: str) -> str:
    """A name that is fit for a file, and no other's."""
    fit = "".join(c if c.isalnum() or c in "-+_=." else "_" for c in name)
    return fit if fit == name else f"{fit}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _digest(run: str | Path) -> str:
    """Of all adapters of a run."""
    folders = all_adapter_folders(run, Topology.from_dict(read_description(run)["topology"]))
    kept = (folder / ADAPTER_FILE for folder in folders)
    return hashlib.sha256(b"".join(path.read_bytes() for path in kept)).hexdigest()


def changes(now: Any, before: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Name, value now and value before of leaves that are in both mappings and differ."""
    if isinstance(now, dict) and isinstance(before, dict):
        for name in now.keys() & before.keys():
            yield from changes(now[name], before[name], name)
    elif now != before:
        yield key, now, before
