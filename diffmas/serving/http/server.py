"""uvicorn around the application: where it listens is said in a line, Ctrl-C and SIGTERM end it in order."""

from __future__ import annotations

import socket

import uvicorn
from fastapi import FastAPI

#: Seconds that answers on their way are waited for when the server ends.
_GRACE = 10


def listen(app: FastAPI, host: str, port: int, name: str, most: int) -> None:
    """Serve `app` until the process is told to end.

    Args:
        port: 0: any that is free.
        name: of what is served.
        most: requests that are answered at once; a few more connections are kept, to be told so.

    Raises:
        OSError: an address that cannot be listened on.
    """
    config = uvicorn.Config(
        app, log_level="warning", timeout_graceful_shutdown=_GRACE, limit_concurrency=4 * most + 16, lifespan="on"
    )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
        except OSError as error:
            raise OSError(f"host {host!r}, port {port}: {error.strerror or error}; allowed: a free one") from None
        place = f"[{host}]" if ":" in host else host
        print(f"{name}: http://{place}:{listening.getsockname()[1]}/v1", flush=True)
        uvicorn.Server(config).run(sockets=[listening])
