"""`python -m diffmas.eval --run DIR`: accuracy of a trained run under every trace control.

With `--methods`, all of them on all `--tasks` and `--seeds`: what has to be trained is trained first, with the flags of
`diffmas.train` given here; killed and started again, it goes on where it was.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from diffmas.command_line import LESS_MEMORY, parse_command
from diffmas.comparison.session import compare
from diffmas.evaluation.session import evaluate
from diffmas.evaluation.settings import EvalArguments
from diffmas.support.failures import run_program
from diffmas.support.interrupts import raise_on_interrupt

PROGRAM = "python -m diffmas.eval"


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate a run, or compare methods. Returns the process's exit status: 130 after Ctrl-C."""
    raise_on_interrupt()
    args, flags = parse_command(
        EvalArguments, argv, prog=PROGRAM, description=__doc__, takes_flags=lambda args: args.methods is not None
    )
    return run_program(
        PROGRAM, lambda: evaluate(args) if args.methods is None else compare(args, flags, PROGRAM), lower=LESS_MEMORY
    )


if __name__ == "__main__":
    sys.exit(main())
