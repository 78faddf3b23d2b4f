"""`python -m diffmas.chat --run DIR`: ask a system, watch it answer, and see what each agent contributed."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from diffmas.command_line import parse_command
from diffmas.conversation.settings import ChatArguments
from diffmas.conversation.terminal import talk
from diffmas.support.failures import run_program
from diffmas.support.interrupts import raise_on_interrupt

PROGRAM = "python -m diffmas.chat"
#: What takes less memory where it is smaller.
LOWER = "--latent_steps, --max_new_tokens, a shorter question"


def main(argv: Sequence[str] | None = None) -> int:
    """Ask and answer until the end of the input. Returns the process's exit status."""
    raise_on_interrupt()
    args, _ = parse_command(ChatArguments, argv, prog=PROGRAM, description=__doc__)
    return run_program(PROGRAM, lambda: talk(args), lower=LOWER)


if __name__ == "__main__":
    sys.exit(main())
