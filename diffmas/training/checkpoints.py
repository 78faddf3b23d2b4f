"""A training's checkpoints: written beside and renamed once they are complete, read only where they are whole."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from diffmas.agents.topology import Topology
from diffmas.models.alignment import AlignmentOptions
from diffmas.runs.description import known, read_description
from diffmas.runs.files import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    ALIGNMENT_FILE,
    BRIDGES_FILE,
    SYSTEM_FILE,
    all_adapter_folders,
    model_folder,
)
from diffmas.support.atomic import write_atomically
from diffmas.support.failures import reading
from diffmas.support.text_file import read_text
from diffmas.support.valid_json import to_json

STATE_FILE, OPTIMIZER_FILE, SCHEDULER_FILE = "trainer_state.json", "optimizer.pt", "scheduler.pt"
#: Of a checkpoint: what its run's description said, when it was written, of how it was trained.
SETTINGS_FILE = "settings.json"
#: Parts of a run's description that say how its weights were trained.
TRAINED = ("training", "arguments")
ONLY_MODEL = "as save_only_model leaves it"
#: Where in a run's folder a checkpoint is written before it gets its name.
STAGING = ".checkpoint"


def checkpoints(run: str | Path) -> list[Path]:
    """The checkpoint folders of a run, latest step first."""
    named = Path(run).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    found = [p for p in named if p.is_dir() and p.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)


def damage(checkpoint: str | Path) -> str | None:
    """What keeps a training from going on from `checkpoint`, naming the file; None where nothing does."""
    checkpoint = Path(checkpoint)
    try:
        state = json.loads((checkpoint / STATE_FILE).read_text())
        if not all(isinstance(state[name], int) for name in ("global_step", "max_steps", "train_batch_size")):
            return f"{STATE_FILE} is damaged"
    except FileNotFoundError:
        return f"{STATE_FILE} is missing"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{STATE_FILE} is damaged"
    for path in _weights(checkpoint):
        if not path.is_file():
            return f"{path.relative_to(checkpoint)} is missing"
        if path.suffix == ".safetensors" and not _is_safetensors(path):
            return f"{path.relative_to(checkpoint)} is damaged"
    for name in (OPTIMIZER_FILE, SCHEDULER_FILE):
        if not (checkpoint / name).is_file():
            return f"{name} is missing, {ONLY_MODEL}"
    if not any(checkpoint.glob("rng_state*.pth")):
        return "rng_state.pth is missing"
    for path in (*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")):
        if not _is_archive(path):
            return f"{path.name} is damaged"
    return None


def latest(run: str | Path) -> tuple[Path | None, list[str]]:
    """The latest checkpoint that a training can go on from, and what is wrong with later ones, in a line each."""
    notes = []
    for path in checkpoints(run):
        if (problem := damage(path)) is None:
            return path, notes
        notes.append(f"{path} cannot be gone on from: {problem}")
    return None, notes


def set_aside(run: str | Path, step: int) -> list[Path]:
    """Rename the checkpoints of `run` behind `step` to `….old`: a training that goes on from there writes its own."""
    later = [path for path in checkpoints(run) if int(path.name.rpartition("-")[2]) > step]
    for path in later:
        old = path.with_name(f"{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)
    return later


def stage_best(checkpoint: str | Path, run: str | Path) -> Path | None:
    """A copy in `run`, for :func:`put_in_place`, of the best checkpoint so far, where it is of another run.

    Raises:
        ValueError: it is missing or damaged.
    """
    if not (best := read_state(checkpoint).best_global_step):
        return None
    there, here = (checkpoint_path(folder, best) for folder in (Path(checkpoint).resolve().parent, run))
    if (problem := damage(there)) is not None and ONLY_MODEL not in problem:
        raise ValueError(
            f"load_best_model_at_end is True, and the best checkpoint so far is {there}: {problem}; allowed: False"
        )
    return None if here.exists() else Path(shutil.copytree(there, checkpoint_path(Path(run, STAGING), best)))


def keep_settings(run: str | Path, checkpoint: str | Path) -> None:
    """Write into a checkpoint of `run` what the run's description says of its training, where there is one."""
    if Path(run, SYSTEM_FILE).is_file():
        write_atomically(Path(checkpoint, SETTINGS_FILE), to_json(_trained(read_description(run)), indent=2) + "\n")


def trained_with(checkpoint: str | Path, run: Mapping[str, Any]) -> dict[str, Any]:
    """The parts :data:`TRAINED` of the description that `checkpoint` was written under.

    `run`: the description of its run as it is now, which holds for a checkpoint that has kept none.
    """
    path = Path(checkpoint, SETTINGS_FILE)
    if not path.is_file():
        return _trained(run)
    with reading(str(path)):
        return _trained(json.loads(read_text(path, "checkpoint")))


def _trained(description: Mapping[str, Any]) -> dict[str, Any]:
    return {part: description[part] for part in TRAINED if part in description}


def checkpoint_path(folder: str | Path, step: int) -> Path:
    return Path(folder, f"{PREFIX_CHECKPOINT_DIR}-{step}")


def rotate(run: str | Path, limit: int | None, best: int | None) -> None:
    """Remove checkpoints beyond `limit`: the latest stays, then that of step `best`, then the later ones."""
    if limit is None or limit <= 0:
        return
    found = checkpoints(run)
    favourite = None if best is None else checkpoint_path(run, best)
    ordered = sorted(found, key=lambda path: path not in (found[0], favourite))
    for path in ordered[max(limit, 1 + (favourite in found[1:])) :]:
        shutil.rmtree(path)


def step_of(checkpoint: str | Path) -> int:
    return read_state(checkpoint).global_step


def read_state(checkpoint: str | Path) -> TrainerState:
    return TrainerState.load_from_json(str(Path(checkpoint, STATE_FILE)))


def put_in_place(staged: str | Path, run: str | Path) -> Path:
    """Give the complete checkpoint `staged` its place in `run`, instead of one of the same step."""
    target = Path(run, Path(staged).name)
    if target.exists():
        replaced = Path(staged).with_name("replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(target, replaced)
    os.replace(staged, target)
    shutil.rmtree(Path(staged).parent, ignore_errors=True)
    return target


def clear_staging(run: str | Path) -> None:
    """Remove what a killed process left of a checkpoint."""
    shutil.rmtree(Path(run, STAGING), ignore_errors=True)


def _weights(checkpoint: Path) -> list[Path]:
    """The files in which a checkpoint keeps weights; those of one adapter where its run's description is unreadable."""
    files = [checkpoint / ADAPTER_FILE, checkpoint / ADAPTER_CONFIG_FILE]
    try:
        description = json.loads(read_text(checkpoint.resolve().parent / SYSTEM_FILE, "run"))
        topology = Topology.from_dict(description["topology"])
        learns = known(AlignmentOptions, description["system"]).trains
    except (OSError, ValueError, KeyError, TypeError):
        return files
    folders = all_adapter_folders(checkpoint, topology)
    files = [folder / name for folder in folders for name in (ADAPTER_FILE, ADAPTER_CONFIG_FILE)]
    if learns:
        files += [model_folder(checkpoint, topology, name) / ALIGNMENT_FILE for name in topology.thinking_models]
    return [*files, checkpoint / BRIDGES_FILE] if topology.bridge_edges else files


def _is_safetensors(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            file.keys()
    except (SafetensorError, OSError, ValueError):
        return False
    return True


def _is_archive(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError, ValueError, EOFError):
        return False
