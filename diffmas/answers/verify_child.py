"""Answers whether pairs of answers are equal, one JSON pair a line: the child of :mod:`diffmas.answers.verifier`."""

import sys

sys.path.pop(0)  # this script's own folder, whose modules are named like some of the standard library

import contextlib
import json
import os
import resource
import signal

MEMORY = 4 << 30


def main():
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    # What libraries print does not become an answer.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)

    from math_verify import ExprExtractionConfig, LatexExtractionConfig, StringExtractionConfig, parse, verify

    kinds = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig(), StringExtractionConfig()]

    def read(answer):
        return parse(f"\\boxed{{{answer}}}", kinds, parsing_timeout=None)

    answers.write("ready\n")
    for line in sys.stdin:
        equal = False
        with contextlib.suppress(Exception):
            gold, found = json.loads(line)
            equal = bool(verify(read(gold), read(found), strict=True, timeout_seconds=None))
        answers.write(json.dumps(equal) + "\n")


main()
