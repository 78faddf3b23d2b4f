"""`python -m diffmas.show --task TASK --index 3`: what each agent reads of an item, and what the last one is taught.

Every flag of `diffmas.train` may be given, and says what it says there. No model is loaded, but its tokenizer.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from diffmas.command_line import parse_command
from diffmas.conversation.preview import ShowArguments, show
from diffmas.support.failures import run_program
from diffmas.support.interrupts import raise_on_interrupt

PROGRAM = "python -m diffmas.show"


def main(argv: Sequence[str] | None = None) -> int:
    """Print one item as its agents read it. Returns the process's exit status."""
    raise_on_interrupt()
    args, flags = parse_command(
        ShowArguments, argv, prog=PROGRAM, description=__doc__, takes_flags=lambda args: args.run is None
    )
    return run_program(PROGRAM, lambda: show(args, flags, PROGRAM), lower="--max_prompt_tokens")


if __name__ == "__main__":
    sys.exit(main())
