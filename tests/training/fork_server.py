"""Runs programs of the package in forked processes, killed at a moment given: imports are paid for once.

Reads requests as JSON lines {"program", "argv", "kill_after", "signal", "output"}; answers {"status", "seconds"}.
"""

import importlib
import json
import os
import signal
import sys
import time

PROGRAMS = {name: importlib.import_module(f"diffmas.{name}") for name in ("train", "eval")}


def run(program, argv, kill_after, number, output):
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with open(output, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        status = 1
        try:
            status = PROGRAMS[program].main(argv)
        except KeyboardInterrupt:
            status = 130
        finally:
            sys.stdout.flush()
            os._exit(status)
    while kill_after is not None and time.monotonic() < began + kill_after:
        if (ended := os.waitpid(child, os.WNOHANG))[0]:
            return os.waitstatus_to_exitcode(ended[1]), time.monotonic() - began
        time.sleep(0.002)
    if kill_after is not None:
        os.kill(child, number)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), time.monotonic() - began


def main():
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        status, seconds = run(
            request["program"], request["argv"], request["kill_after"], request["signal"], request["output"]
        )
        print(json.dumps({"status": status, "seconds": seconds}), flush=True)


main()
