"""Continuous decoding: finished answers leave the batch, waiting ones enter it in groups."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from diffmas.agents.controls import Control
from diffmas.agents.trajectory import Trajectory
from diffmas.generation.decoding import Completion, Decoding, Event
from diffmas.generation.pool import OwnTraces, Prompt, SharedTraces
from diffmas.generation.received import checked_seeds, received
from diffmas.generation.sampling import Draws, Uniforms, choose
from diffmas.generation.text import TextStream, cut, decode
from diffmas.models.agent_model import AgentModel, Lengths, evaluating
from diffmas.prompts.chat_template import end_of_turn
from diffmas.support.not_finite import NotFiniteError

#: `step(model, pool, tokens)` runs one decoding step: the logits `[answers, vocab]` behind `tokens [answers]`, which
#: the pool's traces hold afterwards.
Step = Callable[[AgentModel, OwnTraces, Tensor], Tensor]

#: Room for new tokens that a trace starts with; from there on it grows by doubling.
_FIRST_ROOM = 64


def eager_step(model: AgentModel, pool: OwnTraces, tokens: Tensor) -> Tensor:
    """One forward of the model, operation by operation."""
    pool.open()
    hidden = model.run(pool, input_ids=tokens)
    pool.close()
    return model.head(hidden)


@dataclass(eq=False)
class Answer:
    """One sample of one row, on its way."""

    row: int
    sample: int
    draws: Draws
    text: TextStream | None
    slot: int = -1
    started: float = 0.0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    #: The last token, stop token included, and what it made certain of the text.
    last: int = -1
    piece: str = ""
    finish: str | None = None


class Engine:
    """Decodes the answers of a batch of rows, at most `decoding.max_rows` of them at once.

    Waiting rows are admitted in groups: their senders run, then the last agent reads its prompts, once a row
    whatever the number of samples. A row's tokens do not depend on the rows it is decoded with, or when.

    Args:
        trajectory: its model decodes in evaluation mode, without gradient; :func:`generate` and :func:`stream` see to
            both.
        prompt_ids, prompt_lengths: as :meth:`~diffmas.agents.trajectory.Trajectory.communicate` takes them.
        tokenizer: of the answers; its end-of-sequence token, that which ends its chat template's turns, and those of
            the model's generation configuration stop.
        seeds: one a row, of its samples and of the control; default `decoding.seed + row`.
        control: what happens to the trace the last agent receives; it sees the rows in consecutive blocks of
            `max_rows` (a last block of one row joins the block before it), since one row's trace may be given to
            another.
        streaming: keep track of every answer's text.
        step: how one token of every answer is decoded.

    Raises:
        ValueError: prompts or seeds that do not fit, named.
    """

    def __init__(
        self,
        trajectory: Trajectory,
        prompt_ids: Sequence[Tensor],
        prompt_lengths: Sequence[Lengths],
        tokenizer: PreTrainedTokenizerBase,
        decoding: Decoding,
        *,
        seeds: Sequence[int] | None = None,
        control: Control | None = None,
        streaming: bool = False,
        step: Step = eager_step,
    ):
        self._seeds = checked_seeds(trajectory, prompt_ids, prompt_lengths, decoding, seeds, control)
        self.rows, self.samples = rows, samples = len(self._seeds), decoding.samples
        self._trajectory, self._model = trajectory, trajectory.model_of(trajectory.topology.last)
        self._tokenizer, self._decoding = tokenizer, decoding
        self._control, self._step = control, step
        device = self._model.device
        self._ids = [ids.to(device).split(list(n)) for ids, n in zip(prompt_ids, prompt_lengths, strict=True)]
        self._stops = stop_ids(self._model, tokenizer)
        self._uniforms = Uniforms(device)
        self._waiting = deque(
            Answer(
                row,
                sample,
                Draws(self._seeds[row], sample),
                TextStream(tokenizer, decoding.stop) if streaming or decoding.stop else None,
            )
            for row in range(rows)
            for sample in range(samples)
        )
        # Rows whose prompts have been read and that have samples waiting; the row up to which that was done.
        self._prompts: dict[int, Prompt] = {}
        self._started: dict[int, float] = {}
        self._read = 0
        self._active: list[Answer] = []
        self._pool: OwnTraces | None = None

    def run(self) -> Iterator[list[Answer]]:
        """Step by step, the answers that have one more token; those with `finish` set are done."""
        tokens = torch.empty(0, dtype=torch.long, device=self._model.device)
        while self._waiting or self._active:
            if self._active:
                logits = self._step(self._model, self._pool, tokens)
                answers = self._active
            if count := self._admissible():
                entering = [self._waiting.popleft() for _ in range(count)]
                first = self._admit(entering)
                logits = torch.cat((logits, first)) if self._active else first
                answers = self._active + entering
            tokens = self._choose(answers, logits)
            yield answers
            keep = [i for i, answer in enumerate(answers) if answer.finish is None]
            if len(keep) < len(answers):
                for answer in answers:
                    if answer.finish is not None:
                        self._pool.release(answer.slot)
                tokens = tokens[torch.tensor(keep, dtype=torch.long).to(tokens.device)]
                answers = [answers[i] for i in keep]
            if answers is not self._active:
                self._active = answers
                if answers:
                    self._pool.plan([answer.slot for answer in answers])

    def completion(self, answer: Answer) -> Completion:
        """What a finished answer comes to."""
        text = cut(decode(self._tokenizer, answer.tokens), self._decoding.stop)
        seconds = time.perf_counter() - answer.started
        return Completion(answer.tokens, text, answer.logprobs, answer.entropies, answer.finish, seconds)

    def _admissible(self) -> int:
        """How many waiting answers to admit now: all there is room for, but not in ones and twos."""
        free = self._decoding.max_rows - len(self._active)
        enough = min(len(self._waiting), max(1, self._decoding.max_rows // 4))
        return min(free, len(self._waiting)) if free >= enough else 0

    def _admit(self, entering: list[Answer]) -> Tensor:
        """Give every answer a slot behind its row's trace; returns the logits of their first tokens."""
        while entering[-1].row >= self._read:
            self._read_prompts(1 + entering[-1].row - self._read)
        prompts = [self._prompts[answer.row] for answer in entering]
        if self._pool is None:
            self._pool = (OwnTraces if self._decoding.samples == 1 else SharedTraces)(prompts[0].trace)
        for answer, slot in zip(entering, self._pool.admit(prompts), strict=True):
            answer.slot, answer.started = slot, self._started[answer.row]
        unfinished = self._waiting[0].row if self._waiting else self._read
        self._prompts = {row: prompt for row, prompt in self._prompts.items() if row >= unfinished}
        return torch.stack([prompt.logits for prompt in prompts])

    def _read_prompts(self, count: int) -> None:
        """Run the senders of the next `count` rows and read the last agent's prompts behind them."""
        started = time.perf_counter()
        total = len(self._seeds)
        if self._control is not None:
            count = self._decoding.max_rows
            count += total - self._read - count == 1
        rows = range(self._read, min(self._read + count, total))
        self._read = rows.stop
        ids = [torch.cat(agent[rows.start : rows.stop]) for agent in self._ids]
        lengths = [[len(agent[row]) for row in rows] for agent in self._ids]
        room = [min(self._decoding.max_new_tokens, _FIRST_ROOM)] * len(rows)
        seeds = [self._seeds[row] for row in rows]
        trace = received(self._trajectory, ids, lengths, seeds, self._control, room)
        last = [(n - 1, n) for n in lengths[-1]]
        hidden = self._model.read(trace, lengths[-1], input_ids=ids[-1], outputs=last)
        logits = self._model.head(hidden)
        for i, row in enumerate(rows):
            self._prompts[row], self._started[row] = Prompt(trace, i, logits[i], self.samples), started

    def _choose(self, answers: list[Answer], logits: Tensor) -> Tensor:
        """The next token of every answer, kept in it; also `[answers]` on the device."""
        temperature, top_p = self._decoding.temperature, self._decoding.top_p
        uniforms = self._uniforms.next([a.draws for a in answers]) if temperature else None
        tokens, rows = choose(logits, uniforms, temperature, top_p)
        for answer, (token, logprob, entropy) in zip(answers, rows, strict=True):
            if math.isnan(logprob):
                raise NotFiniteError("the model's logits are not finite, so that no token can be chosen")
            answer.logprobs.append(logprob)
            answer.entropies.append(entropy)
            self._append(answer, int(token))
        return tokens

    def _append(self, answer: Answer, token: int) -> None:
        answer.last, answer.piece = token, ""
        if token in self._stops:
            answer.finish = "stop"
            return
        answer.tokens.append(token)
        if answer.text is not None:
            answer.piece = answer.text.push(token)
            if answer.text.stopped:
                answer.finish = "stop"
        if answer.finish is None and len(answer.tokens) == self._decoding.max_new_tokens:
            answer.finish = "length"


@torch.no_grad()
def generate(trajectory: Trajectory, *args, **kwargs) -> list[list[Completion]]:
    """All answers, `[row][sample]`; arguments as for :class:`Engine`."""
    engine = Engine(trajectory, *args, **kwargs)
    finished: dict[tuple[int, int], Completion] = {}
    with evaluating(nn.ModuleList(trajectory.models.values())):
        for answers in engine.run():
            for answer in answers:
                if answer.finish is not None:
                    finished[answer.row, answer.sample] = engine.completion(answer)
    return [[finished[row, sample] for sample in range(engine.samples)] for row in range(engine.rows)]


@torch.no_grad()
def stream(trajectory: Trajectory, *args, **kwargs) -> Iterator[Event]:
    """Tokens as they come; arguments as for :class:`Engine`. The model is in evaluation mode until it is exhausted."""
    engine = Engine(trajectory, *args, streaming=True, **kwargs)
    with evaluating(nn.ModuleList(trajectory.models.values())):
        for answers in engine.run():
            for answer in answers:
                completion, piece = None, answer.piece
                if answer.finish is not None:
                    completion = engine.completion(answer)
                    piece += answer.text.finish(completion.text)
                yield Event(answer.row, answer.sample, answer.last, piece, completion)


def stop_ids(model: AgentModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Token ids that end an answer: the tokenizer's, its chat template's and the model's generation configuration's."""
    configured = model.language_model.generation_config.eos_token_id
    ids = configured if isinstance(configured, (list, tuple)) else [configured]
    return {int(i) for i in (*ids, tokenizer.eos_token_id, end_of_turn(tokenizer)) if i is not None}
