"""Going on with a run: its own settings are the default; what differs is named, or refused if it makes another run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from diffmas.runs.description import read_description
from diffmas.runs.files import SYSTEM_FILE
from diffmas.support.launch import launched
from diffmas.tasks.base import JSONL
from diffmas.training.checkpoints import ONLY_MODEL, STATE_FILE, damage, latest, step_of
from diffmas.training.rules import BY_METRIC

#: Training arguments that say where and from what a run goes on, and so are none of its settings.
PLACES = ("output_dir", "resume_from_checkpoint")
#: What may be another on going on: it decides neither what is computed nor on what, up to rounding.
FREE = {"backend", "cuda_graphs", "checkpointing", "loss"}
#: Training arguments that an optimizer's or a schedule's state may depend on.
UPDATES = ("optim", "lr_scheduler_type", "learning_rate", "loraplus_lr_ratio")
#: Where items are read from; their content is compared instead.
FILES = ("task", "data_dir", "eval_file", "prompts")


def run_folder(resume: str, output_dir: str | None) -> Path | None:
    """The folder of the run that `--resume_from_checkpoint` names; "True" means that of `output_dir`, "False" none.

    Raises:
        ValueError: "True" without an output folder.
    """
    if resume.lower() == "false":
        return None
    if resume.lower() == "true":
        if output_dir is None:
            raise ValueError("resume_from_checkpoint is True without output_dir; allowed: with it, or a run's folder")
        return Path(output_dir)
    folder = Path(resume)
    # A link to a checkpoint, or "." in one, says nothing about the run it is of.
    real = folder.resolve()
    if not ((real / STATE_FILE).is_file() or _is_checkpoint(real)):
        return folder
    return folder.parent if folder.name and folder.absolute() == real else real.parent


def own_settings(run: Path) -> dict[str, Any]:
    """A run's own settings by argument, those that differ from the defaults; none where it has not written any."""
    if not (run / SYSTEM_FILE).is_file():
        return {}
    description = read_description(run)
    parts = (description[part] for part in ("system", "task", "decoding"))
    own = {name: value for part in parts for name, value in part.items()} | description.get("arguments", {})
    if launched()[1] == 1:
        # How several processes shared the work says nothing about one.
        own = {name: value for name, value in own.items() if not name.startswith(("fsdp", "ddp_"))}
    return own


def given_settings(args: Any) -> dict[str, Any]:
    """The training arguments that were given, as they were given, ready for JSON."""
    usual = {f.name: f.default for f in fields(args)}
    given = {k: v for k, v in args.given.items() if k not in PLACES and not k.endswith("token") and v != usual[k]}
    return {k: str(getattr(v, "value", v)) if not _is_json(v) else v for k, v in given.items()}


def checkpoint_of(resume: str, run: Path) -> Path | None:
    """The checkpoint to go on from, said in a line; None where the run has to begin anew.

    Raises:
        FileNotFoundError: a folder without a run. ValueError: a checkpoint, asked for by name, that is damaged.
    """
    named = Path(resume)
    if run.is_dir() and not (run / SYSTEM_FILE).is_file() and (named != run or latest(run)[0]):
        raise FileNotFoundError(f"resume_from_checkpoint is {resume!r}: {run} has no {SYSTEM_FILE}, so it is no run")
    if named != run and resume.lower() != "true":
        if (problem := damage(named)) is not None:
            raise ValueError(f"resume_from_checkpoint is {resume!r}: {problem}; allowed: a complete checkpoint")
        found = named
    else:
        if not run.is_dir():
            raise FileNotFoundError(f"resume_from_checkpoint is {resume!r}: no such folder as {run}")
        found, notes = latest(run)
        if found is None and any(ONLY_MODEL in note for note in notes):
            raise FileNotFoundError(f"{notes[0]}; allowed: a run with complete checkpoints")
        for note in notes:
            print(note)
        if found is None and not (run / SYSTEM_FILE).is_file():
            raise FileNotFoundError(f"resume_from_checkpoint is {resume!r}: it holds no checkpoint, nor a run")
        found = _not_before_origin(found, run)
    print(f"{run} has no checkpoint yet: from the beginning" if found is None else
          f"going on from {found}, step {step_of(found)}")  # fmt: skip
    return found


def origin(checkpoint: Path, output_dir: str | Path) -> dict[str, Any]:
    """What a description says of the checkpoint that a run goes on from where that is none of its own."""
    real = checkpoint.resolve()
    if real.parent == Path(output_dir).resolve():
        return {}
    return {"continues": {"checkpoint": str(real), "step": step_of(real)}}


def _not_before_origin(found: Path | None, run: Path) -> Path | None:
    """The checkpoint that `run` itself went on from where it has `found` no later one of its own.

    Raises:
        ValueError: that is gone or damaged.
    """
    began = read_description(run).get("continues", {})
    if not began or (found is not None and step_of(found) >= int(began.get("step", 0))):
        return found
    checkpoint = Path(str(began.get("checkpoint")))
    if (problem := damage(checkpoint)) is not None:
        raise ValueError(
            f"{run} went on from {checkpoint} and has no checkpoint of its own yet: {problem}; allowed: with that "
            "checkpoint in its place, or --resume_from_checkpoint with its new place and another --output_dir"
        )
    return checkpoint


def check_same(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between the descriptions of a run and of its continuation, in a line each.

    Raises:
        ValueError: a difference that makes it another run.
    """
    notes = []
    if "arguments" not in before:
        notes.append("the run did not keep its training arguments: those given now and the defaults hold")
    for part in ("system", "topology", "task", "decoding", "arguments"):
        old, new = before.get(part, {}), now[part]
        if part == "topology":
            # A run from before there were others.
            old = {"adapters": "shared", "adapter_options": {}} | old
        for key in dict.fromkeys([*old, *new]):
            if part != "arguments" and (key not in old or key not in new):
                continue  # a setting that only one of two versions has
            was, value = old.get(key), new.get(key)
            if was == value or (part == "task" and key in FILES and _same_kind(key, was, value)):
                continue
            if part == "system" and key in ("topology", "handover", "handover_sink", "adapters", "bridge_states"):
                continue  # what they come to is compared
            if key == "checker" and was is None:
                continue  # chosen anew from the same right answers
            if key == "model_name_or_path" and _has_moved(was, value):
                notes.append(f"{key} is {value!r}; the run had {was!r}, which is gone")
                continue
            if part == "arguments" and key in UPDATES and _changes_updates(key, was, value, old, new):
                raise ValueError(
                    f"{key} is {_shown(value)}, but the run to go on with had {_shown(was)}, whose state does not fit "
                    f"it; allowed: the same, or {key} left out"
                )
            if part in ("system", "topology", "task") and key not in FREE:
                raise ValueError(
                    f"{key} is {value!r}, but the run to go on with had {was!r}; allowed: the same, or {key} left out"
                )
            notes.append(f"{key} is {_shown(value)}; the run had {_shown(was)}")
    for name, what in (("data", "items"), ("prompts", "prompts")):
        old, new = before.get(name), now[name]
        if old is not None and old != new:
            different = ", ".join(k for k in new if old.get(k) != new[k])
            raise ValueError(
                f"the {what} ({different}) are not those that the run to go on with was trained on; allowed: the same "
                f"content, in files of any place ({', '.join(FILES)})"
            )
    return notes


def _same_kind(key: str, was: Any, value: Any) -> bool:
    if key != "task" or was == value:
        return True
    return str(was).endswith(JSONL) and str(value).endswith(JSONL)


def _changes_updates(key: str, was: Any, value: Any, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether the optimizer's or the schedule's state means something else under the new value."""
    if key == "optim":
        return True
    if key == "loraplus_lr_ratio":
        # With 1, all parameters are in the groups that transformers makes.
        return 1 in (was or 1, value or 1)
    schedules = {arguments.get("lr_scheduler_type") for arguments in (old, new)}
    return not schedules.isdisjoint(BY_METRIC)


def _has_moved(was: Any, value: Any) -> bool:
    """Whether a model folder that is gone is given anew in another place."""
    return all(isinstance(v, str) and Path(v).is_absolute() for v in (was, value)) and not Path(was).exists()


def _is_checkpoint(folder: Path) -> bool:
    prefix, _, step = folder.name.rpartition("-")
    return prefix == "checkpoint" and step.isdecimal() and folder.is_dir()


def _is_json(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_json, value))
    if isinstance(value, dict):
        return all(map(_is_json, value.values()))
    return type(value) in (str, int, float, bool, type(None))


def _shown(value: Any) -> str:
    return "the default" if value is None else repr(value)
