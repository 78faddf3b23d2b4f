"""`python -m diffmas.lm_eval`: the command line of lm-evaluation-harness (extra `lm-eval`), with `--model diffmas`.

    python -m diffmas.lm_eval --model diffmas --model_args run=runs/gsm8k,field=question --tasks gsm8k \\
        --apply_chat_template

In Python: `lm_eval.simple_evaluate(model=HarnessModel("runs/gsm8k"), tasks=["arc_easy"])`. The last agent's prompt is
the harness's context, token for token; the agents before it read their role prompts about the document.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from diffmas.agents.collator import pack
from diffmas.agents.thinking import own_options
from diffmas.answers import reasoning
from diffmas.evaluation.answering import evaluating, progress_bar
from diffmas.generation import Decoding
from diffmas.generation.text import cut
from diffmas.loading import load_run
from diffmas.prompts import Prompts
from diffmas.prompts.chat_template import parse_kwargs, render
from diffmas.tasks import as_asked

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise ModuleNotFoundError(
        "diffmas.lm_eval needs lm-evaluation-harness, which is not installed; install diffmas[lm-eval]"
    ) from error

#: Handed over by the harness where it is told nothing.
_HARNESS_DEFAULT = "cuda:0"


class HarnessModel(LM):
    """Answers the harness's requests with a run's system.

    Args:
        run: folder written by `diffmas.train`.
        prompts: YAML file or family of role prompts for the agents before the last, over the field `question`; default:
            the run's own.
        field: of the harness's documents, which these agents read as `question`; beside it they may name any other.
            None: they read the context that the last agent reads, of a chat its last message.
        batch_size: rows at once. `max_new_tokens`: longest answer where a request does not say.
        think_end_token: what ends the reasoning of a model that writes some; only what follows is its answer.
        chat_template_args: what the chat template is told, beside or instead of what the run tells it.
        adapter: False for the untrained system.
        device: default: a GPU if there is one. The harness's own default, cuda:0, is the CPU where there is none.

    Raises:
        FileNotFoundError: a folder that holds no finished run. ValueError: an argument outside its range.
    """

    def __init__(
        self,
        run: str | Path,
        *,
        prompts: str | None = None,
        field: str | None = None,
        batch_size: int | str = 8,
        max_new_tokens: int = 256,
        think_end_token: str | None = None,
        chat_template_args: Mapping[str, Any] | str | None = None,
        adapter: bool = True,
        device: str | None = None,
    ):
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size is {batch_size!r}; allowed: integers ≥ 1")
        loaded = load_run(run)
        self.system, self.tokenizer = loaded.system, loaded.tokenizer
        self.system.to(_device(device))
        own = as_asked(
            Prompts.load(prompts or loaded.task.prompts or "reasoning"), replace(loaded.task, max_prompt_tokens=None)
        )
        self.prompts = own.with_options(parse_kwargs(chat_template_args, "chat_template_args"))
        self.field, self.think_end_token = field, think_end_token
        self.size, self.adapter = int(batch_size), adapter
        self.decoding = Decoding(max_new_tokens=max_new_tokens, temperature=0)
        # The last message of every chat that was rendered, by what it was rendered to.
        self._said: dict[str, str] = {}

    @property
    def tokenizer_name(self) -> str:
        """Names what decides how a chat is written, for the harness's cache of requests."""
        last = own_options(self.prompts, self.system.topology)
        decided_by = [self.chat_template(True), dict(last.chat_template_kwargs), last.date]
        digest = hashlib.sha256(json.dumps(decided_by, sort_keys=True).encode()).hexdigest()
        return f"{str(self.tokenizer.name_or_path).replace('/', '__')}-{digest[:16]}"

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template that chats are written with: the tokenizer's, or the one it calls so."""
        if not chat_template or not self.tokenizer.chat_template:
            return ""
        return str(self.tokenizer.get_chat_template(chat_template if isinstance(chat_template, str) else None))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as the last agent reads it; without `add_generation_prompt` its last message goes on.

        Raises:
            ValueError: a tokenizer without a chat template.
        """
        if not self.tokenizer.chat_template:
            raise ValueError("apply_chat_template is given, and the model has no chat template; allowed: without")
        last = own_options(self.prompts, self.system.topology)
        text = render(
            self.tokenizer, chat_history, last.chat_template_kwargs, last.date, ready=add_generation_prompt,
            going_on=not add_generation_prompt,
        )  # fmt: skip
        asked = [message["content"] for message in chat_history if message["role"] == "user"]
        self._said[text] = asked[-1] if asked else text
        return text

    def loglikelihood(self, requests: Sequence[Any], **options) -> list[tuple[float, bool]]:
        """Per (context, continuation): its log-probability in nats, and whether greedy decoding writes it."""
        results = []
        for batch in self._rows(requests):
            pairs = [self._encode_pair(*request.args) for request in batch]
            ids, lengths = self._prompt_tokens(batch, [before for before, _ in pairs])
            answer_ids, answer_lengths = pack([tokens for _, tokens in pairs])
            results += self._score(ids, lengths, answer_ids, answer_lengths)
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], **options) -> list[float]:
        """Per text: its log-probability in nats, from the end-of-sequence token on."""
        results = []
        for batch in self._rows(requests):
            begin = [[self.tokenizer.eos_token_id]] * len(batch)
            ids, lengths = self._prompt_tokens(batch, begin)
            encoded = [self.tokenizer(request.args[0], add_special_tokens=False)["input_ids"] for request in batch]
            scores = self._score(ids, lengths, *pack(encoded))
            results += [score for score, _ in scores]
        return results

    def generate_until(self, requests: Sequence[Any], **options) -> list[str]:
        """Per (context, settings): the answer, cut before the first of the strings `until`, less its reasoning."""
        results: list[str] = []
        for _, same in itertools.groupby(requests, key=lambda request: repr(request.args[1])):
            for batch in self._rows(list(same)):
                contexts = [request.args[0] for request in batch]
                last = self.tokenizer(contexts, add_special_tokens=False)["input_ids"]
                ids, lengths = self._prompt_tokens(batch, [t or [self.tokenizer.eos_token_id] for t in last])
                seeds = range(len(results), len(results) + len(batch))
                settings = self._settings(batch[0].args[1])
                # Nothing stops within reasoning.
                thinks = self.think_end_token is not None or any(map(reasoning.opened, contexts))
                decoding = replace(settings, stop=()) if thinks else settings
                with evaluating(self.system, adapter=self.adapter):
                    answers = self.system.generate(ids, lengths, self.tokenizer, decoding, seeds=list(seeds))
                texts = zip(contexts, (samples[0].text for samples in answers), strict=True)
                results += [cut(self._answer(context, text), settings.stop) for context, text in texts]
        return results

    def _answer(self, context: str, text: str) -> str:
        """What was written, less its reasoning; nothing where that never ended."""
        if self.think_end_token and self.think_end_token in text:
            return text.rpartition(self.think_end_token)[2].lstrip()
        return reasoning.removed(reasoning.continued(context, text))

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

    def _rows(self, requests: Sequence[Any]) -> Iterator[Sequence[Any]]:
        """Those that run together, with a progress bar."""
        with progress_bar(show=True) as progress:
            bar = progress.add_task("requests", total=len(requests))
            for begin in range(0, len(requests), self.size):
                yield (batch := requests[begin : begin + self.size])
                progress.advance(bar, len(batch))

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both, split where the context's own tokens end; spaces at the seam belong to the continuation."""
        stripped = context.rstrip()
        context, continuation = stripped, context[len(stripped) :] + continuation
        if not context:
            return [self.tokenizer.eos_token_id], self.tokenizer(continuation, add_special_tokens=False)["input_ids"]
        whole = self.tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
        before = self.tokenizer(context, add_special_tokens=False)["input_ids"]
        return whole[: len(before)], whole[len(before) :]

    def _prompt_tokens(self, requests: Sequence[Any], last: Sequence[Sequence[int]]):
        """Packed prompts of all agents: role prompts for those before the last, `last` for the last one."""
        items = [self._item(request) for request in requests]
        rows = [
            self.prompts.with_options(agent.chat_template_kwargs).encode(
                agent.role, items, self.system.tokenizer_of(agent)
            )
            for agent in self.system.topology.agents[:-1]
        ]
        packed = [pack(r) for r in (*rows, last)]
        return [ids for ids, _ in packed], [lengths for _, lengths in packed]

    def _item(self, request: Any) -> dict[str, Any]:
        """What the agents before the last read about a request.

        Raises:
            ValueError: a document without the field.
        """
        if self.field is None:
            return {"question": self._said.get(request.args[0], request.args[0])}
        if self.field not in request.doc:
            raise ValueError(f"field is {self.field!r}; allowed: a document's own, {', '.join(request.doc)}")
        return {**request.doc, "question": str(request.doc[self.field])}

    def _score(self, ids, lengths, answer_ids, answer_lengths) -> list[tuple[float, bool]]:
        device = self.system.agent_model.language_model.device
        answer_ids = answer_ids.to(device)
        with evaluating(self.system, adapter=self.adapter):
            logits = self.system([t.to(device) for t in ids], lengths, answer_ids, answer_lengths).logits
        chosen = logits.float().log_softmax(-1).gather(1, answer_ids[:, None]).squeeze(1)
        greedy = logits.argmax(-1) == answer_ids
        parts = zip(chosen.split(answer_lengths), greedy.split(answer_lengths), strict=True)
        return [(float(c.sum()), bool(g.all())) for c, g in parts]


def _device(asked: str | None) -> str:
    there = torch.cuda.is_available()
    return asked or "cuda" if there else "cpu" if asked in (None, _HARNESS_DEFAULT) else asked


def main() -> int:
    """The harness's own command line."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
    return 0


if __name__ == "__main__":
    # The registry knows the class under the name by which others import it.
    from diffmas.lm_eval import main as registered

    sys.exit(registered())

register_model("diffmas")(HarnessModel)
