"""What a trajectory comes to where the model itself recomputes whatever moved. There is no rotation here, and no cache.

Keys and values of a segment are functions of what went into each layer when its agent wrote it, and of where they
stand now. So a receiver's call is one plain forward of the whole causal language model over everything it attends to,
from position 0 on, and in front of every layer the columns of received segments are set to what went into that layer
in their own agent's run. Masks, rotations, norms, sinks and caps are the model's, at the final positions.

A row runs alone. With `detach`, received columns are read without gradient into the model's own cache first.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache


@dataclass
class Segment:
    """What one agent wrote: `embeds [n, hidden]`, and what went into each layer, `[…, n, …]`.

    `prompt` of its columns are the prompt's. `axis` is that of the columns in `inputs`.
    """

    embeds: Tensor
    inputs: list[Tensor]
    prompt: int
    axis: int

    def handed_over(self, handover: str) -> Segment:
        """The columns a receiver gets."""
        if handover == "full":
            return self
        rest = len(self.embeds) - self.prompt
        inputs = [x.narrow(self.axis, self.prompt, rest) for x in self.inputs]
        return Segment(self.embeds[self.prompt :], inputs, 0, self.axis)


class RecomputedModel:
    """A causal language model, possibly inside PEFT, whose received columns are set in front of every layer."""

    def __init__(self, model: nn.Module):
        self.causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        decoder = self.causal.get_decoder()
        self.decoder = self.causal.model if decoder is self.causal else decoder
        self.layers = _layers_of(self.decoder, self.causal.config.get_text_config(decoder=True).num_hidden_layers)
        with torch.no_grad():
            vocabulary = torch.arange(self.causal.get_input_embeddings().weight.shape[0])
            self._factor = self._of_looked_up(vocabulary[:3])
            #: Mean norm of what the decoder gets for a token.
            self.rho = self.embedding(vocabulary).norm(dim=1).mean()

    def embedding(self, ids: Tensor) -> Tensor:
        """Tokens as the decoder has to be given them."""
        return self.causal.get_input_embeddings()(ids) * self._factor

    def _of_looked_up(self, ids: Tensor) -> float:
        """What the decoder multiplies embeddings by that it looks up itself, and not those that it is given."""
        entered = []
        for inputs in ({"input_ids": ids[None]}, {"inputs_embeds": self.causal.get_input_embeddings()(ids)[None]}):
            with self._set([]) as seen:
                self.decoder(**inputs, use_cache=False)
            entered.append(seen[0])
        by_id, given = entered
        factor = float((by_id * given).sum() / given.square().sum())
        return 1.0 if torch.equal(by_id, given) else factor

    def read(
        self, received: Sequence[Segment], embeds: Tensor, *, detach: bool = False
    ) -> tuple[Tensor, Tensor, list[Tensor], int]:
        """`embeds [n, hidden]` behind `received`.

        Returns hidden states `[n, hidden]` after the final norm, logits `[n, vocab]`, and what went into each layer,
        with the axis of its columns.
        """
        before = sum(len(s.embeds) for s in received)
        if not before:
            return self._forward([], embeds)
        moved = torch.cat([s.embeds for s in received])
        if not detach:
            hidden, logits, inputs, axis = self._forward(received, torch.cat((moved, embeds)))
            own = [x.narrow(axis, before, len(embeds)) for x in inputs]
            return hidden[before:], logits[before:], own, axis
        if any(hasattr(module, "expand_kv") for module in self.decoder.modules()):
            return self._read_behind_expanded(received, torch.cat((moved, embeds)), before)
        with torch.no_grad(), self._set(received):
            cache = DynamicCache(config=self.causal.config.get_text_config(decoder=True))
            try:
                kept = self.causal(inputs_embeds=moved[None], past_key_values=cache, use_cache=True).past_key_values
            except ValueError:
                # A model with a kind of cache of its own makes one.
                cache = kept = self.causal(inputs_embeds=moved[None], use_cache=True).past_key_values
        if kept is not cache:
            raise RuntimeError(f"{type(self.causal).__name__} kept no cache of what it received")
        return self._forward([], embeds, past_key_values=cache)

    def _read_behind_expanded(
        self, received: Sequence[Segment], embeds: Tensor, before: int
    ) -> tuple[Tensor, Tensor, list[Tensor], int]:
        """Where the cache keeps latents that weights expand on every read: cut behind the expansion instead."""

        def cut(function):
            @functools.wraps(function)
            def expanded(*args):
                return tuple(torch.cat((x[:, :, :before].detach(), x[:, :, before:]), 2) for x in function(*args))

            return expanded

        modules = [module for module in self.decoder.modules() if hasattr(module, "expand_kv")]
        for module in modules:
            module.expand_kv = cut(module.expand_kv)
        try:
            hidden, logits, inputs, axis = self._forward(received, embeds)
        finally:
            for module in modules:
                del module.expand_kv
        own = [x.narrow(axis, before, len(embeds) - before) for x in inputs]
        return hidden[before:], logits[before:], own, axis

    def _forward(
        self, received: Sequence[Segment], embeds: Tensor, **options
    ) -> tuple[Tensor, Tensor, list[Tensor], int]:
        found: list[Tensor] = []

        def keep(module, args, output):
            found.append(output[0] if isinstance(output, tuple) else output.last_hidden_state)

        handle = self.decoder.register_forward_hook(keep)
        try:
            with self._set(received) as seen:
                logits = self.causal(inputs_embeds=embeds[None], use_cache=bool(options), **options).logits
        finally:
            handle.remove()
        inputs = [seen[i] for i in range(len(self.layers))]
        return found[0][0], logits[0], inputs, _columns(inputs[0], len(embeds))

    @contextlib.contextmanager
    def _set(self, received: Sequence[Segment]) -> Iterator[dict[int, Tensor]]:
        """Sets received columns in front of every layer; yields what went into each."""
        seen: dict[int, Tensor] = {}

        def before(index: int):
            def hook(module, args, kwargs):
                x = args[0] if args else kwargs["hidden_states"]
                if received:
                    axis = received[0].axis
                    columns = sum(s.inputs[index].shape[axis] for s in received)
                    rest = x.narrow(axis, columns, x.shape[axis] - columns)
                    x = torch.cat([*(s.inputs[index] for s in received), rest], axis)
                seen[index] = x
                return ((x, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": x})

            return hook

        handles = [m.register_forward_pre_hook(before(i), with_kwargs=True) for i, m in enumerate(self.layers)]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()


def _layers_of(decoder: nn.Module, count: int) -> list[nn.Module]:
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    # Layers that attend several times: what an attention gets is what its norm gets, and the rest of a received column
    # is nothing that anyone sees.
    norms = [getattr(layer, "input_layernorm", None) for layer in getattr(decoder, "layers", ())]
    if norms and all(isinstance(each, nn.ModuleList) for each in norms):
        found = [norm for each in norms for norm in each]
        if len(found) == count:
            return found
    raise RuntimeError(f"{type(decoder).__name__} has no list of {count} layers")


def _columns(x: Tensor, count: int) -> int:
    """The axis of columns: the second of `[1, n, …]`, or the last but one where something stands in front of it."""
    return 1 if x.shape[0] == 1 and x.shape[1] == count else x.dim() - 2


def ancestors(dag: Mapping[str, Sequence[str]], name: str) -> list[str]:
    """All agents whose writing reaches `name`, in the order of `dag` (a topological one)."""
    found: set[str] = set()
    waiting = list(dag[name])
    while waiting:
        found.add(top := waiting.pop())
        waiting.extend(dag[top])
    return [n for n in dag if n in found]


def received_by_last(
    model: RecomputedModel,
    dag: Mapping[str, Sequence[str]],
    prompts: Mapping[str, Tensor],
    *,
    handover: str,
    latent_steps: int,
    detach: bool = False,
    weight: Tensor | None = None,
) -> list[Segment]:
    """What the last agent of one row attends to: every agent before it reads its prompt int64 `[n]` and thinks.

    Args:
        dag: agent name -> senders, in topological order.
        weight: Wₐ, or None for the identity.
    """
    written: dict[str, Segment] = {}
    for name in list(dag)[:-1]:
        with torch.no_grad() if detach else contextlib.nullcontext():
            received = [written[sender].handed_over(handover) for sender in ancestors(dag, name)]
            embeds = model.embedding(prompts[name])
            hidden, _, inputs, axis = model.read(received, embeds)
            for _ in range(latent_steps):
                y = hidden[-1] if weight is None else hidden[-1] @ weight
                embeds = torch.cat((embeds, (model.rho * y / y.norm())[None]))
                hidden, _, inputs, axis = model.read(received, embeds)
            written[name] = Segment(embeds, inputs, len(prompts[name]), axis)
    return [written[sender].handed_over(handover) for sender in ancestors(dag, list(dag)[-1])]


def batch(model: nn.Module, dag, prompts, answers, *, detach: bool = False, **options) -> tuple[Tensor, Tensor]:
    """Mean answer loss and packed logits of a batch: `prompts[name][b]`, `answers[b]`; options as above."""
    recomputed, packed = RecomputedModel(model), []
    last = list(dag)[-1]
    for b, answer in enumerate(answers):
        row = {name: rows[b] for name, rows in prompts.items()}
        received = received_by_last(recomputed, dag, row, detach=detach, **options)
        embeds = recomputed.embedding(torch.cat((row[last], answer)))
        logits = recomputed.read(received, embeds, detach=detach)[1]
        packed.append(logits[len(row[last]) - 1 : -1])
    logits = torch.cat(packed)
    return F.cross_entropy(logits, torch.cat(list(answers)), reduction="sum") / len(logits), logits


@torch.no_grad()
def greedy(model: nn.Module, dag, prompts, count: int, **options) -> list[tuple[list[int], list[float]]]:
    """`count` tokens of every row and their log-probabilities, everything recomputed for every token."""
    recomputed, found = RecomputedModel(model), []
    last = list(dag)[-1]
    for b in range(len(prompts[last])):
        row = {name: rows[b] for name, rows in prompts.items()}
        received = received_by_last(recomputed, dag, row, **options)
        ids, tokens, logprobs = row[last], [], []
        for _ in range(count):
            distribution = recomputed.read(received, recomputed.embedding(ids))[1][-1].log_softmax(-1)
            tokens.append(int(distribution.argmax()))
            logprobs.append(float(distribution[tokens[-1]]))
            ids = torch.cat((ids, ids.new_tensor(tokens[-1:])))
        found.append((tokens, logprobs))
    return found
