"""`python -m diffmas.serve --run DIR`: an OpenAI-compatible endpoint; every answer is a whole team's."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from diffmas.command_line import parse_command
from diffmas.evaluation.inspection import contributions
from diffmas.serving.http.session import ServeArguments, serve
from diffmas.support.failures import run_program
from diffmas.support.interrupts import raise_on_interrupt

PROGRAM = "python -m diffmas.serve"
#: What takes less memory where it is smaller.
LOWER = "--batch_size, --max_waiting, --max_new_tokens"


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until told to end. Returns the process's exit status: 130 after Ctrl-C before it listens."""
    raise_on_interrupt()
    args, _ = parse_command(ServeArguments, argv, prog=PROGRAM, description=__doc__)
    return run_program(PROGRAM, lambda: serve(args, contributions), lower=LOWER)


if __name__ == "__main__":
    sys.exit(main())
