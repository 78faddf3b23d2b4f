"""`python -m diffmas.train`: train a multi-agent system and evaluate what its traces carry."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from diffmas.command_line import parse_training
from diffmas.support.failures import run_program
from diffmas.support.interrupts import raise_on_interrupt
from diffmas.training.session import train

PROGRAM = "python -m diffmas.train"
#: What takes less memory where it is smaller.
LOWER = (
    "--per_device_train_batch_size, --latent_steps, --max_new_tokens, --lora_r, --train_size; or --checkpointing all"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Train, evaluate, write the run's folder. Returns the process's exit status: 130 after Ctrl-C."""
    raise_on_interrupt()
    return run_program(PROGRAM, lambda: train(*parse_training(argv, prog=PROGRAM, description=__doc__)), lower=LOWER)


if __name__ == "__main__":
    sys.exit(main())
