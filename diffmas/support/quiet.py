"""What libraries say that nobody here can act on, silenced where it comes from."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator

from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from transformers.utils import logging as transformers_logging


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Without transformers' bar over weights and without what PEFT's use of transformers is warned of.

    Downloads keep their bars.
    """
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    if shown:
        enable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            yield
    finally:
        (transformers_logging.enable_progress_bar if shown else disable_progress_bars)()


def quiet_profiler() -> None:
    """torch's profiler announces no start and stop; to be said before it is first used."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def quiet_checkpoints() -> None:
    """Nothing is said of how checkpoints are put in order: their numbers are as good as their times.

    Nor of a best one that is gone from where it was written: it is found by its step.
    """
    logging.getLogger("transformers.trainer_utils").addFilter(_no_mtime)
    logging.getLogger("transformers.trainer").addFilter(_no_moved_best)


def _no_mtime(record: logging.LogRecord) -> bool:
    return "mtime may not be reliable" not in record.getMessage()


def _no_moved_best(record: logging.LogRecord) -> bool:
    return "recorded in the resumed state does not exist anymore" not in record.getMessage()
