"""What answers questions that come over HTTP: the senders run here, and our own engine, or another one, decodes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from diffmas.generation.decoding import Decoding
from diffmas.generation.engine import Answer, Engine
from diffmas.generation.received import checked_seeds
from diffmas.models.agent_model import evaluating
from diffmas.system import MultiAgentSystem

T = TypeVar("T")
Found = TypeVar("Found")
_logger = logging.getLogger(__name__)
#: Why questions fail that wait while the server ends; how answers end that nobody waits for.
CLOSING, CANCELLED = "the server is shutting down", "cancelled"


class Overloaded(Exception):
    """As many questions wait as may."""


@dataclass(frozen=True, eq=False)
class Question:
    """One item as the agents read it.

    Attributes:
        prompts: token ids of every agent's prompt, in the order of the topology.
        decoding: of `decoding.samples` answers; its seed is the question's.
    """

    prompts: Sequence[Tensor]
    decoding: Decoding

    @property
    def prompt_tokens(self) -> int:
        """Of all agents."""
        return sum(map(len, self.prompts))


@dataclass(frozen=True)
class Piece:
    """What has become certain of one answer.

    Attributes:
        sample: which of the question's answers. text: its next part, empty where a character is not complete.
        tokens: new ones, without a stop token; logprobs: theirs. spent: tokens generated, a stop token included.
        finish: "stop" or "length", on the last one.
    """

    sample: int
    text: str
    tokens: Sequence[int] = ()
    logprobs: Sequence[float] = ()
    spent: int = 0
    finish: str | None = None


class Backend(Protocol):
    """Answers questions, many at a time."""

    def check(self, question: Question) -> None:
        """Raise `ValueError` where it cannot be answered."""

    def answer(self, question: Question) -> AsyncGenerator[Piece, None]:
        """Its answers as they come; whoever stops listening stops the work.

        Raises:
            Overloaded: too many wait. RuntimeError: the work failed.
        """

    async def look(self, call: Callable[[MultiAgentSystem], Found]) -> Found:
        """What `call` gives of the system, which does nothing else meanwhile.

        Raises:
            Overloaded: too many wait. RuntimeError: it failed.
        """

    def healthy(self) -> bool:
        """Whether it answers."""

    async def close(self) -> None:
        """Let go of everything; questions that wait fail."""


def check_question(system: MultiAgentSystem, question: Question) -> None:
    """Raise `ValueError` where `system` could not answer `question` by itself."""
    ids, lengths = packed([question])
    checked_seeds(system.trajectory, ids, lengths, question.decoding, None, None)


def packed(questions: Sequence[Question]) -> tuple[list[Tensor], list[list[int]]]:
    """Prompts and their lengths, by agent, of questions as the rows of a batch."""
    agents = list(zip(*(question.prompts for question in questions), strict=True))
    return [torch.cat(rows) for rows in agents], [[len(row) for row in rows] for rows in agents]


@dataclass(eq=False)
class Job(Generic[T]):
    """A question on its way, and where its pieces go; an exception in their place ends it."""

    question: Question
    loop: asyncio.AbstractEventLoop
    pieces: asyncio.Queue[T | Exception] = field(default_factory=asyncio.Queue)
    cancelled: bool = False
    begun: bool = False

    def tell(self, piece: T | Exception) -> None:
        """From any thread."""
        self.begun = True
        if not self.cancelled:
            # A loop that has ended has nobody who listens.
            with contextlib.suppress(RuntimeError):
                self.loop.call_soon_threadsafe(self.pieces.put_nowait, piece)

    @property
    def kind(self) -> Decoding:
        """Questions of one kind can be decoded together; their seeds are their own."""
        return replace(self.question.decoding, seed=0)


class Worker(Generic[T]):
    """A thread that takes waiting questions of one kind together.

    Args:
        work: what is done with them.
        most: questions that may wait or be at work.
        together: questions taken at once.
    """

    def __init__(self, work: Callable[[Sequence[Job[T]]], None], most: int, together: int):
        self._work, self._most, self._together = work, most, together
        self._waiting: deque[Job[T]] = deque()
        self._jobs: set[Job[T]] = set()
        self._calls: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._wake, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, name="answers", daemon=True)
        self._thread.start()

    async def told(self, question: Question) -> AsyncGenerator[T, None]:
        """What work tells of a question, for as long as somebody listens.

        Raises:
            Overloaded: too many wait. RuntimeError: the work failed.
        """
        job: Job[T] = Job(question, asyncio.get_running_loop())
        with self._wake:
            self._check_room()
            self._jobs.add(job)
            self._waiting.append(job)
            self._wake.notify()
        try:
            while True:
                piece = await job.pieces.get()
                if isinstance(piece, Exception):
                    raise RuntimeError(str(piece) or type(piece).__name__) from piece
                yield piece
        finally:
            job.cancelled = True
            with self._wake:
                self._jobs.discard(job)

    async def between(self, call: Callable[[], Found]) -> Found:
        """What `call` gives in this thread, between answers.

        Raises:
            Overloaded: too many wait. RuntimeError: it failed.
        """
        future: Future[Found] = Future()
        with self._wake:
            self._check_room()
            self._calls.append((future, call))
            self._wake.notify()
        return await asyncio.wrap_future(future)

    def _check_room(self) -> None:
        if self._closed:
            raise RuntimeError(CLOSING)
        if (there := len(self._jobs) + len(self._calls)) >= self._most:
            raise Overloaded(f"{there} questions wait or are being answered; allowed: {self._most}")

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._waiting or self._calls or self._closed)
                if self._closed:
                    return
                calls, self._calls = self._calls, deque()
                jobs = self._take() if self._waiting else []
            for future, call in calls:
                _called(future, call)
            if jobs:
                self._answer(jobs)

    def _answer(self, jobs: Sequence[Job[T]]) -> None:
        try:
            self._work(jobs)
        except Exception as error:
            _logger.exception("questions could not be answered")
            for job in jobs:
                # One of them may have been too much for the others.
                if len(jobs) == 1 or job.begun:
                    job.tell(error)
                elif not job.cancelled:
                    self._answer([job])

    def _take(self) -> list[Job[T]]:
        """The first that waits, and those of its kind behind it."""
        waiting = [job for job in self._waiting if not job.cancelled]
        taken = [job for job in waiting if job.kind == waiting[0].kind][: self._together]
        self._waiting = deque(job for job in waiting if job not in taken)
        return taken

    @property
    def alive(self) -> bool:
        """Whether questions are answered."""
        return self._thread.is_alive() and not self._closed

    def close(self) -> None:
        """Fail what waits, stop what is at work, and wait for the thread."""
        with self._wake:
            self._closed = True
            jobs, calls = list(self._jobs), list(self._calls)
            self._wake.notify()
        for future, _ in calls:
            if future.set_running_or_notify_cancel():
                future.set_exception(RuntimeError(CLOSING))
        for job in jobs:
            job.tell(RuntimeError(CLOSING))
            job.cancelled = True
        self._thread.join()


def _called(future: Future[Found], call: Callable[[], Found]) -> None:
    # Nobody waits for one that was cancelled.
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(call())
    except Exception as error:
        _logger.exception("a look at the system failed")
        future.set_exception(RuntimeError(str(error) or type(error).__name__))


class OwnBackend:
    """Our own engine. Questions that wait are decoded together, those that come meanwhile after them.

    Args:
        system: in evaluation mode.
        most: questions that may wait or be at work.
        together: answers decoded at once.
    """

    def __init__(self, system: MultiAgentSystem, *, most: int = 64, together: int = 64):
        self._system = system
        self._worker = Worker(self._work, most, together)

    def check(self, question: Question) -> None:
        """See :class:`Backend`."""
        check_question(self._system, question)

    async def answer(self, question: Question) -> AsyncGenerator[Piece, None]:
        """See :class:`Backend`."""
        unfinished = question.decoding.samples
        async with contextlib.aclosing(self._worker.told(question)) as told:
            async for piece in told:
                yield piece
                unfinished -= piece.finish is not None
                if not unfinished:
                    return

    async def look(self, call: Callable[[MultiAgentSystem], Found]) -> Found:
        """See :class:`Backend`."""
        return await self._worker.between(lambda: call(self._system))

    def healthy(self) -> bool:
        """See :class:`Backend`."""
        return self._worker.alive

    async def close(self) -> None:
        """See :class:`Backend`."""
        await asyncio.to_thread(self._worker.close)

    @torch.no_grad()
    def _work(self, jobs: Sequence[Job[Piece]]) -> None:
        ids, lengths = packed([job.question for job in jobs])
        trajectory, seeds = self._system.trajectory, [job.question.decoding.seed for job in jobs]
        engine = Engine(trajectory, ids, lengths, self._system.tokenizer, jobs[0].kind, seeds=seeds, streaming=True)
        with evaluating(nn.ModuleList(trajectory.models.values())):
            for answers in engine.run():
                for answer in answers:
                    job = jobs[answer.row]
                    if job.cancelled:
                        # Its place is another's from the next step on.
                        answer.finish = answer.finish or CANCELLED
                    else:
                        job.tell(_piece(engine, answer))
                if all(job.cancelled for job in jobs):
                    return


def _piece(engine: Engine, answer: Answer) -> Piece:
    text = answer.piece
    if answer.finish is not None:
        text += answer.text.finish(engine.completion(answer).text)
    is_text = len(answer.tokens) == len(answer.logprobs)
    tokens, logprobs = (answer.tokens[-1:], answer.logprobs[-1:]) if is_text else ((), ())
    return Piece(answer.sample, text, tokens, logprobs, len(answer.logprobs), answer.finish)
