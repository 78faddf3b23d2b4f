"""The endpoint itself: bodies in, answers and streams out, within limits; clients that leave stop their work."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from pydantic import ValidationError
from torch import Tensor

from diffmas.models.errors import UnsupportedModelError
from diffmas.serving.http.backends import Backend, Overloaded, Piece, Question
from diffmas.serving.http.protocol import ChatBody, CompletionBody, Reader, Reply, error_body
from diffmas.support.valid_json import to_json
from diffmas.system import MultiAgentSystem

T = TypeVar("T")
Body = TypeVar("Body", bound=ChatBody | CompletionBody)
#: `inspect(system, prompts, tokens)`: what an answer was made from, for JSON; prompts of all agents, token ids of each.
Inspect = Callable[[MultiAgentSystem, Sequence[Tensor], Sequence[int]], dict[str, Any]]
_PAGE = Path(__file__).with_name("page.html")
#: nginx's, for a client that has closed its connection.
_CLIENT_LEFT = 499


class _Refused(Exception):
    def __init__(self, status: int, message: str, kind: str = "invalid_request_error"):
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind


def create_app(backend: Backend, reader: Reader, inspect: Inspect | None = None) -> FastAPI:
    """The application in front of `backend`, which it closes when it ends.

    Args:
        inspect: looks at answers for `/inspect` and the page at `/`; None: there are no such.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await backend.close()

    app = FastAPI(title="DiffMAS", lifespan=lifespan, openapi_url=None)

    @app.exception_handler(_Refused)
    async def refused(request: Request, error: _Refused) -> Response:
        return JSONResponse(error_body(error.message, error.kind, error.status), error.status)

    @app.get("/health")
    async def health() -> Response:
        healthy = await asyncio.to_thread(backend.healthy)
        return JSONResponse({"status": "ok" if healthy else "failed"}, 200 if healthy else 503)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        entry = {"id": reader.name, "object": "model", "created": 0, "owned_by": "diffmas", "fields": reader.fields}
        return {"object": "list", "data": [entry]}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _answer(request, ChatBody)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _answer(request, CompletionBody)

    if inspect is not None:

        @app.get("/")
        async def page() -> Response:
            return HTMLResponse(_PAGE.read_text())

        @app.post("/inspect")
        async def inspected(request: Request) -> Response:
            body, question = await _asked(request, ChatBody)
            if body.stream or body.n > 1:
                raise _Refused(400, f"stream is {body.stream} and n is {body.n}; allowed to inspect: False and 1")
            with _refusing():
                found = await _unless_left(request, _inspected(Reply(reader, body, question), question))
            return _json(found)

    async def _inspected(reply: Reply, question: Question) -> dict[str, Any]:
        pieces = await _all(backend.answer(question))
        tokens = [token for piece in pieces for token in piece.tokens]
        looked = await backend.look(lambda system: inspect(system, question.prompts, tokens))
        return {**reply.whole(pieces), **looked}

    async def _asked(request: Request, kind: type[Body]) -> tuple[Body, Question]:
        body = _parsed(await _read(request, reader.limits.body_bytes), kind)
        with _refusing():
            question = await asyncio.to_thread(reader.question, body)
            await asyncio.to_thread(backend.check, question)
        return body, question

    async def _answer(request: Request, kind: type[ChatBody] | type[CompletionBody]) -> Response:
        body, question = await _asked(request, kind)
        reply, pieces = Reply(reader, body, question), backend.answer(question)
        if body.stream:
            with _refusing():
                first = await anext(pieces)
            return StreamingResponse(_events(reply, first, pieces), media_type="text/event-stream")
        with _refusing():
            found = await _unless_left(request, _all(pieces))
        return _json(None if found is None else reply.whole(found))

    return app


async def _read(request: Request, most: int) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > most:
            raise _Refused(413, f"the body has more than {most} bytes; allowed: up to that")
    return bytes(body)


def _parsed(data: bytes, kind: type[Body]) -> Body:
    try:
        return cast(Body, kind.model_validate_json(data))
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'the body'}: {e['msg']}" for e in error.errors()[:3])
        raise _Refused(400, wrong) from None


@contextlib.contextmanager
def _refusing():
    """Errors of a question and of its work, as answers to the request."""
    try:
        yield
    except Overloaded as error:
        raise _Refused(429, str(error), "overloaded_error") from None
    except (ValueError, TypeError, UnsupportedModelError) as error:
        raise _Refused(400, str(error)) from None
    except RuntimeError as error:
        raise _Refused(500, str(error), "server_error") from None


def _json(found: dict[str, Any] | None) -> Response:
    """None: the client has left."""
    if found is None:
        return Response(status_code=_CLIENT_LEFT)
    return Response(to_json(found), media_type="application/json")


async def _all(pieces: AsyncIterator[Piece]) -> list[Piece]:
    return [piece async for piece in pieces]


async def _unless_left(request: Request, work: Awaitable[T]) -> T | None:
    """What `work` gives; None, and no more work, where the client has left."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _events(reply: Reply, first: Piece, pieces: AsyncGenerator[Piece, None]) -> AsyncIterator[str]:
    """Server-sent events; ended early, they end the work."""
    try:
        for chunk in reply.first():
            yield _event(chunk)
        if (chunk := reply.chunk(first)) is not None:
            yield _event(chunk)
        async for piece in pieces:
            if (chunk := reply.chunk(piece)) is not None:
                yield _event(chunk)
        for chunk in reply.last():
            yield _event(chunk)
        yield "data: [DONE]\n\n"
    except RuntimeError as error:
        # The status has been sent.
        yield _event(error_body(str(error), "server_error", 500))
    finally:
        await pieces.aclose()


def _event(chunk: dict[str, Any]) -> str:
    return f"data: {to_json(chunk)}\n\n"
