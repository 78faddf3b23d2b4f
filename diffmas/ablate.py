"""`python -m diffmas.ablate --run DIR --latent_steps 0,2,4,8`: train and evaluate at every value, plot and tabulate.

Every axis given several values is swept by itself, all else as the flags of `diffmas.train` have it; an axis given one
value is such a flag. Killed and started again, it goes on where it was.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from diffmas.command_line import LESS_MEMORY, parse_command
from diffmas.comparison.ablation import AblateArguments, ablate
from diffmas.support.failures import run_program
from diffmas.support.interrupts import raise_on_interrupt

PROGRAM = "python -m diffmas.ablate"


def main(argv: Sequence[str] | None = None) -> int:
    """Sweep, print a table, write summary and report. Returns the process's exit status: 130 after Ctrl-C."""
    raise_on_interrupt()
    args, flags = parse_command(AblateArguments, argv, prog=PROGRAM, description=__doc__, takes_flags=lambda args: True)
    return run_program(PROGRAM, lambda: ablate(args, flags, PROGRAM), lower=LESS_MEMORY)


if __name__ == "__main__":
    sys.exit(main())
