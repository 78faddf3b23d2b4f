"""A multi-agent system as a model of lm-evaluation-harness (extra `lm-eval`): its tasks run on a trained run.

    lm_eval.simple_evaluate(model=HarnessModel("runs/gsm8k"), tasks=["arc_easy"])

The last agent's prompt is the harness's context, token for token; the agents before it read their role prompts with the
context as the question.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from diffmas.agents.collator import pack
from diffmas.answers import reasoning
from diffmas.evaluation.answering import evaluating
from diffmas.generation import Decoding
from diffmas.loading import load_run
from diffmas.prompts import Prompts

try:
    from lm_eval.api.model import LM
except ImportError as error:
    raise ModuleNotFoundError(
        "diffmas.lm_eval needs lm-evaluation-harness, which is not installed; install diffmas[lm-eval]"
    ) from error


class HarnessModel(LM):
    """Answers the harness's requests with a run's system.

    Args:
        run: folder written by `diffmas.train`.
        prompts: YAML file or family of role prompts for the agents before the last, over the field `question`.
        batch_size: rows at once. `max_new_tokens`: longest answer where a request does not say.
        adapter: False for the untrained system.

    Raises:
        FileNotFoundError: a folder that holds no finished run.
    """

    def __init__(
        self,
        run: str | Path,
        *,
        prompts: str | None = None,
        batch_size: int = 8,
        max_new_tokens: int = 256,
        adapter: bool = True,
        device: str | None = None,
    ):
        super().__init__()
        loaded = load_run(run)
        self.system, self.tokenizer = loaded.system, loaded.tokenizer
        self.system.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        own = Prompts.load(prompts or loaded.task.prompts or "reasoning")
        self.prompts = replace(own, date=loaded.task.date)
        self.size, self.adapter = int(batch_size), adapter
        self.decoding = Decoding(max_new_tokens=max_new_tokens, temperature=0)

    def loglikelihood(self, requests: Sequence[Any], **options) -> list[tuple[float, bool]]:
        """Per (context, continuation): its log-probability in nats, and whether greedy decoding writes it."""
        results = []
        for rows in self._rows([request.args for request in requests]):
            pairs = [self._encode_pair(context, continuation) for context, continuation in rows]
            ids, lengths = self._prompt_tokens([context for context, _ in rows], [before for before, _ in pairs])
            answer_ids, answer_lengths = pack([tokens for _, tokens in pairs])
            results += self._score(ids, lengths, answer_ids, answer_lengths)
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], **options) -> list[float]:
        """Per text: its log-probability in nats, from the end-of-sequence token on."""
        results = []
        for texts in self._rows([request.args[0] for request in requests]):
            begin = [[self.tokenizer.eos_token_id]] * len(texts)
            ids, lengths = self._prompt_tokens(texts, begin)
            encoded = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
            scores = self._score(ids, lengths, *pack(encoded))
            results += [score for score, _ in scores]
        return results

    def generate_until(self, requests: Sequence[Any], **options) -> list[str]:
        """Per (context, settings): the answer, cut before the first of the strings `until`, less its reasoning."""
        results = []
        rows = [request.args for request in requests]
        for _, same in itertools.groupby(rows, key=lambda row: repr(row[1])):
            for batch in self._rows(list(same)):
                contexts = [context for context, _ in batch]
                last = self.tokenizer(contexts, add_special_tokens=False)["input_ids"]
                ids, lengths = self._prompt_tokens(contexts, [t or [self.tokenizer.eos_token_id] for t in last])
                seeds = range(len(results), len(results) + len(batch))
                with evaluating(self.system, adapter=self.adapter):
                    answers = self.system.generate(
                        ids, lengths, self.tokenizer, self._settings(batch[0][1]), seeds=list(seeds)
                    )
                results += [reasoning.removed(samples[0].text) for samples in answers]
        return results

    def _settings(self, given: dict[str, Any]) -> Decoding:
        until = given.get("until") or ()
        temperature = float(given.get("temperature") or 0) if given.get("do_sample", True) else 0.0
        return replace(
            self.decoding,
            stop=(until,) if isinstance(until, str) else tuple(until),
            max_new_tokens=int(given.get("max_gen_toks") or self.decoding.max_new_tokens),
            temperature=temperature,
            top_p=float(given.get("top_p") or 1.0),
        )

    def _rows(self, values: list[Any]) -> Iterator[list[Any]]:
        for begin in range(0, len(values), self.size):
            yield values[begin : begin + self.size]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both, split where the context's own tokens end; spaces at the seam belong to the continuation."""
        stripped = context.rstrip()
        context, continuation = stripped, context[len(stripped) :] + continuation
        if not context:
            return [self.tokenizer.eos_token_id], self.tokenizer(continuation, add_special_tokens=False)["input_ids"]
        whole = self.tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
        before = self.tokenizer(context, add_special_tokens=False)["input_ids"]
        return whole[: len(before)], whole[len(before) :]

    def _prompt_tokens(self, contexts: Sequence[str], last: Sequence[Sequence[int]]):
        """Packed prompts of all agents: role prompts for those before the last, `last` for the last one."""
        items = [{"question": context} for context in contexts]
        rows = [self.prompts.encode(a.role, items, self.tokenizer) for a in self.system.topology.agents[:-1]]
        packed = [pack(r) for r in (*rows, last)]
        return [ids for ids, _ in packed], [lengths for _, lengths in packed]

    def _score(self, ids, lengths, answer_ids, answer_lengths) -> list[tuple[float, bool]]:
        device = self.system.agent_model.language_model.device
        answer_ids = answer_ids.to(device)
        with evaluating(self.system, adapter=self.adapter):
            logits = self.system([t.to(device) for t in ids], lengths, answer_ids, answer_lengths).logits
        chosen = logits.float().log_softmax(-1).gather(1, answer_ids[:, None]).squeeze(1)
        greedy = logits.argmax(-1) == answer_ids
        parts = zip(chosen.split(answer_lengths), greedy.split(answer_lengths), strict=True)
        return [(float(c.sum()), bool(g.all())) for c, g in parts]
