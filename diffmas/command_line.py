"""Command line and YAML for the programs: presets, then a YAML file, then flags; later ones win."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

from transformers import HfArgumentParser

from diffmas.runs.settings import SystemArguments
from diffmas.support.yaml_file import read_yaml
from diffmas.tasks.base import JSONL, TaskArguments
from diffmas.training.resuming import own_settings, run_folder
from diffmas.training.settings import DecodingArguments, TrainArguments

#: Flags of an evaluation that take less memory where they are smaller.
LESS_MEMORY = "--batch_size, --samples, --max_new_tokens, --latent_steps, --per_device_train_batch_size"
PRESETS = Path(__file__).parent / "presets"
#: Presets that say only in what they differ from another one.
OVER = {"two_models": "embedded"}

T = TypeVar("T")


class Parser(HfArgumentParser):
    """An argument parser whose errors fit on a line and name the nearest flag; flags are given in full."""

    def __init__(self, *args, **options):
        # `--config` and `--model` are looked at before all others are known, under these names.
        super().__init__(*args, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments:"):
            known = [s for a in self._actions for s in a.option_strings]
            flags = [word.split("=")[0] for word in message.split()[2:] if word.startswith("--")]
            close = [c for flag in flags for c in difflib.get_close_matches(flag, known, n=1)]
            message += f" (did you mean {', '.join(close)}?)" if close else ""
        self.exit(2, f"{self.prog}: error: {message}; --help lists all arguments\n")


def parse(parser: Parser, argv: Sequence[str] | None) -> tuple[Any, ...]:
    """Parse `argv` into the parser's dataclasses, over the values of `--config FILE` and of the preset.

    The preset is the one that `--config` names, or else "paper" with a model, and without one that of the topology's
    name, or "embedded"; of a run that is resumed, its own settings are.
    Exits with a message on a flag that cannot be read.

    Raises:
        ValueError: a value that is not allowed.
    """
    parser.add_argument(
        "--config", metavar="FILE", help=f"YAML file of arguments, or {', '.join(_named())}; flags win."
    )
    argv = list(sys.argv[1:] if argv is None else argv)
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config")
    early.add_argument("--model_name_or_path", "--model")
    early.add_argument("--resume_from_checkpoint")
    early.add_argument("--output_dir")
    early.add_argument("--num_train_epochs")
    early.add_argument("--task")
    early.add_argument("--topology")
    found, _ = early.parse_known_args(argv)
    preset = found.config if found.config in _named() and not Path(found.config).is_file() else None
    values = _read_yaml(parser, found.config) if found.config and preset is None else {}
    resume = found.resume_from_checkpoint or values.get("resume_from_checkpoint")
    run = resume and run_folder(resume, found.output_dir or values.get("output_dir"))
    known = {action.dest for action in parser._actions}
    own = {k: v for k, v in own_settings(run).items() if k in known} if run else {}
    if preset is None:
        topology = found.topology or values.get("topology")
        preset = topology if topology in OVER else "embedded"
        preset = "paper" if found.model_name_or_path or values.get("model_name_or_path") else preset
    parts = [part for part in (OVER.get(preset), preset) if part]
    base = own or {k: v for part in parts for k, v in _read_yaml(parser, str(PRESETS / f"{part}.yaml")).items()}
    if not own and (found.task or values.get("task") or "").endswith(JSONL):
        # As many items as relay draws, no file need have.
        base.pop("eval_size", None)
    if found.num_train_epochs or "num_train_epochs" in values:
        # Steps that nobody asked for would win over the epochs.
        base.pop("max_steps", None)
    parser.set_defaults(**{**base, **values})
    try:
        *dataclasses, _, unknown = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
    except ImportError as error:
        # Of a package that an argument needs; only a missing module is reported on a line.
        raise ModuleNotFoundError(" ".join(str(error).split())) from error
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return tuple(dataclasses)


def parse_command(
    kind: type[T],
    argv: Sequence[str] | None,
    *,
    prog: str,
    description: str | None,
    takes_flags: Callable[[T], bool] = lambda args: False,
) -> tuple[T, list[str]]:
    """The flags of a dataclass, and what is left for `diffmas.train` where it `takes_flags`; exits on a bad one."""
    parser = Parser(kind, prog=prog, description=description)
    args, others = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    if others and not takes_flags(args):
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    return args, others


def parse_training(
    argv: Sequence[str] | None, prog: str = "python -m diffmas.train", description: str | None = None
) -> tuple[SystemArguments, TaskArguments, DecodingArguments, TrainArguments]:
    """The flags of a training; exits with a message on a bad one."""
    kinds = (SystemArguments, TaskArguments, DecodingArguments, TrainArguments)
    return parse(Parser(kinds, prog=prog, description=description), argv)


def _named() -> list[str]:
    """Presets by name."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def _read_yaml(parser: Parser, path: str) -> dict[str, Any]:
    try:
        values = read_yaml(path, "config") or {}
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if isinstance(values, dict):
        # As on the command line, a short name will do.
        names = {option.lstrip("-"): a.dest for a in parser._actions for option in a.option_strings}
        values = {names.get(str(name), name): value for name, value in values.items()}
    known = {a.dest for a in parser._actions}
    if not isinstance(values, dict) or (unknown := sorted(map(str, set(values) - known))):
        what = f"unknown arguments {unknown}" if isinstance(values, dict) else "no mapping of arguments"
        parser.error(f"config {path} has {what}; allowed: the arguments that --help lists")
    types = {name: str(t) for kind in parser.dataclass_types for name, t in get_type_hints(kind).items()}
    for name, value in values.items():
        if value is None or isinstance(value, str) or type(value).__name__ in types.get(name, "").lower():
            continue
        if isinstance(value, (dict, list)):
            parser.error(f"config {path}: {name} is {value!r}; allowed: one value")
        # A text, which is read like that of a flag.
        values[name] = str(value)
    return values


def as_flags(values: Mapping[str, Any]) -> list[str]:
    """Flags for a mapping of arguments; None is left out."""
    return [f"--{name}={value}" for name, value in values.items() if value is not None]


def integers(name: str, text: str) -> list[int]:
    """Different integers ≥ 0 from a list with commas.

    Raises:
        ValueError: anything else.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts) or len(set(map(int, parts))) < len(parts):
        raise ValueError(f"{name} is {text!r}; allowed: different integers ≥ 0, separated by commas")
    return [int(part) for part in parts]
