"""Runs the program on file 3, part after part, and then serves its judge: requests on file 4, answers on file 5.

Its source comes with that of `wire.py`. Nothing in this process is safe from the program, and nothing here decides.
"""

import os
import sys
import types

import wire


def main(packages):
    with open(3, "rb") as file:
        parts = [file.read(int(size)) for size in file.readline().split()]
    sys.path.extend(packages)
    # Not "__main__": harnesses do not run what a solution keeps for its own use as a script.
    module = types.ModuleType("program")
    sys.modules["program"] = module

    def serve(operation, number, args, kwargs):
        if operation == "names":
            return wire.names(module.__dict__, *args)
        return wire.OPERATIONS[operation](peer.held[number], *args, **kwargs)

    peer = wire.Peer(4, 5, serve)
    leave = os._exit
    try:
        for source in parts:
            exec(compile(source, "program.py", "exec"), module.__dict__)
    except BaseException as error:
        frame = {"error": peer._error(error)}
    else:
        frame = {"value": None}
    peer.flush()
    peer.send(frame)
    while frame := peer.receive():
        peer.answer(frame)
    leave(0)


main(sys.argv[1:])
