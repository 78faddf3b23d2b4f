"""A language model as agents use it: calls that attend through traces, and the way from a hidden state to an input."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from diffmas.models.activation_checkpointing import ActivationCheckpointing
from diffmas.models.adapters import NONE, WithAdapter, switch_of
from diffmas.models.agreement import check_agreement, states_alone
from diffmas.models.alignment import IDENTITY, Alignment, AlignmentOptions
from diffmas.models.attention import NAME, attach
from diffmas.models.decoder_layer import fuse_layers
from diffmas.models.dropout import sampling_routers, silence, warn
from diffmas.models.embedding import initial, initial_vectors, input_vectors, proportional
from diffmas.models.errors import UnsupportedModelError
from diffmas.models.fingerprint import made_of
from diffmas.models.head import Head, head_of
from diffmas.models.lora import check_lora, check_peft, fuse_lora
from diffmas.models.loss import AnswerLoss
from diffmas.models.norm import fuse_norms
from diffmas.models.outline import decoder_of, input_embedding
from diffmas.models.recurrent import continue_states, state_bytes
from diffmas.models.rotation import Change
from diffmas.models.soft_alignment import SoftAlignment
from diffmas.models.wrapper import check_unwrapped
from diffmas.support.distributed import is_sharded, reach
from diffmas_ops import Call, KVTrace, Rotary

Lengths = Sequence[int]
#: What a configuration says of masks and frequencies, which models read in every forward.
_READ_ONCE = ("sliding_window", "attention_chunk_size", "layer_types", "rope_parameters")
#: Told of every call before it runs, and whether it is a latent step; may return what is to be told its hidden states.
Observer = Callable[[Call, bool], "Callable[[Tensor], None] | None"]


class AgentModel(nn.Module):
    """One transformers model, with what agents on it share.

    Args:
        model: a causal language model, possibly inside PEFT.
        alignment: from a hidden state to the next input.
        checkpointing: which calls recompute their activations in the backward: "none", "prefill" or "all".
        backend: "auto", or the operators' backend to insist on.
        loss: as in :class:`~diffmas.models.loss.AnswerLoss`.

    Attributes:
        layers: its attention layers by `layer_idx`, in the order of a trace's.
        recurrent: what recurrent layers it has, by name; empty where it has none.
        observers: told of every call, see :data:`Observer`.

    Raises:
        ValueError: an argument outside its range, named.
        UnsupportedModelError: a model whose attention or recurrent layers a trace cannot express.
    """

    # What is found out by running the model looks into its layers, which compiled code hides.
    @torch.compiler.set_stance("force_eager")
    def __init__(
        self,
        model: nn.Module,
        *,
        alignment: AlignmentOptions = IDENTITY,
        checkpointing: str = "none",
        backend: str = "auto",
        loss: str = "auto",
    ):
        super().__init__()
        self.answer_loss = AnswerLoss(loss)
        self.model, self.backend = model, backend
        self.observers: list[Observer] = []
        base = self.language_model
        check_unwrapped(base)
        check_peft(model)
        check_lora(base)
        made = made_of(base)
        alone = states_alone(base, made)
        self.layers = attach(base, made)
        self._config = base.config.get_text_config(decoder=True)
        # Copies: lists and dictionaries are edited in place.
        self._read_once = [(name, deepcopy(vars(self._config).get(name))) for name in _READ_ONCE]
        self._changes = list(dict.fromkeys(g.changes for g in self.layers.values() if g.changes))
        self._silenced, self._warned = silence(base), False
        self._routers = sampling_routers(base)
        self._head = head_of(base)
        vectors, self._factor = input_vectors(base)
        self.recurrent = continue_states(base)
        fuse_lora(base)
        fuse_norms(base)
        fuse_layers(base)
        self.checkpointing = ActivationCheckpointing(base, checkpointing)
        self.alignment: Alignment | SoftAlignment
        if alignment.alignment == "soft":
            self.alignment = SoftAlignment(base, self.head, vectors, alignment, backend=backend)
        else:
            began, out = self.embeddings()
            weight = initial(input_embedding(base)).weight
            tied = weight.data_ptr() == out.data_ptr() and proportional(began, weight)
            self.alignment = Alignment(began, out, alignment, tied=tied, backend=backend)
        check_agreement(self, made, alone, self._factor)

    def train(self, mode: bool = True) -> AgentModel:
        """As for any module; training says once what dropout of the model it goes without."""
        if mode and not self._warned:
            warn(self._silenced, self._routers)
            self._warned = True
        return super().train(mode)

    def with_adapter(self, name: str) -> WithAdapter:
        """This model with calls that run with its adapter `name`, or with "none".

        Raises:
            ValueError: no adapter of that name.
        """
        there = list(getattr(self.model, "peft_config", ()))
        if name not in (*there, NONE):
            raise ValueError(f"adapter is {name!r}, and the model has {there}; allowed: one of these, or {NONE}")
        switch_of(self.language_model, install=True)
        return WithAdapter(self, name)

    @property
    def language_model(self) -> PreTrainedModel:
        """The transformers model, without PEFT around it."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def head(self) -> Head:
        """From hidden states after the final norm to logits."""
        linear = self.language_model.get_output_embeddings()
        if self._head.linear is not linear:
            self._head = replace(self._head, linear=linear)
        return self._head

    def embeddings(self) -> tuple[Tensor, Tensor]:
        """Every token as the model's input, and its row of the head: `[vocab, hidden]` both.

        As the model began, before any adapter trained a copy: a run that is loaded finds the same.
        """
        base = self.language_model
        vectors, factor = input_vectors(base)
        return initial_vectors(base, vectors, factor).detach(), initial(self.head.linear).weight.detach()

    @property
    def device(self) -> torch.device:
        return self.language_model.device

    @property
    def outline(self) -> str:
        """The sizes of its trace, for people."""
        sizes = dict.fromkeys((g.num_kv_heads, g.head_dim) for g in self.layers.values())
        heads = " or ".join(f"{heads} × {dim}" for heads, dim in sizes)
        return f"{len(self.layers)} attention layers of {heads}"

    @property
    def rotaries(self) -> list[Rotary | None]:
        """How the keys of a trace's layers turn with their positions."""
        return [layer.rotary for layer in self.layers.values()]

    @property
    def immovable(self) -> str | None:
        """Why the keys of some layer cannot be moved to other positions; None where they can."""
        found = (f"layer {index}: {g.immovable}" for index, g in self.layers.items() if g.immovable)
        return next(found, None)

    @property
    def trace_sizes(self) -> dict[str, Any]:
        """Of a trace that the model writes: what :meth:`KVTrace.allocate` takes besides rows and capacity."""
        autocast = torch.is_autocast_enabled(self.device.type)
        return dict(
            num_layers=len(self.layers),
            num_kv_heads=_uniform([layer.num_kv_heads for layer in self.layers.values()]),
            head_dim=_uniform([layer.head_dim for layer in self.layers.values()]),
            dtype=torch.get_autocast_dtype(self.device.type) if autocast else self.language_model.dtype,
            device=self.device,
        )

    @cached_property
    def state_bytes(self) -> int:
        """Of what recurrent layers remember of one row."""
        return state_bytes(self.language_model) if self.recurrent else 0

    @property
    def _sharded(self) -> bool:
        """Whether FSDP2 shards the layers: their root is whatever holds this model."""
        layers = getattr(decoder_of(self.language_model), "layers", None)
        return is_sharded(self) or (bool(layers) and is_sharded(layers[0]))

    def read(
        self,
        trace: KVTrace,
        lengths: Lengths | Call,
        *,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        outputs: Sequence[tuple[int, int]] | None = None,
        latent: bool | None = None,
    ) -> Tensor:
        """One call: hidden states after the final norm, `[tokens, hidden]`, of packed new tokens of every row.

        `lengths`: of the rows' new tokens, or a call that was opened on `trace` for them.
        `outputs`: per row, the range of its new tokens whose hidden states are returned; None: all.
        `latent`: whether these are latent steps; None: they are, where they come as embeddings.
        """
        if isinstance(lengths, Call) and outputs is not None:
            raise ValueError(f"outputs is {outputs} beside an open call; allowed: None, a call brings its own")
        call = lengths if isinstance(lengths, Call) else trace.open(lengths, outputs)
        hidden = self.run(call, input_ids=input_ids, inputs_embeds=inputs_embeds, latent=latent)
        if self.recurrent and self._sharded:
            raise UnsupportedModelError(
                f"the model has recurrent layers ({self.recurrent}) and is sharded (FSDP); this is not supported"
            )
        if hidden.requires_grad and self._sharded:
            trace.order.token = reach(trace.order.token, hidden)
        return hidden

    def run(
        self,
        call: Call,
        *,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        latent: bool | None = None,
    ) -> Tensor:
        """Like :meth:`read`, of a call that is open already."""
        self._check_lengths(call)
        if (attends := self.language_model.config._attn_implementation) != NAME:
            raise UnsupportedModelError(
                f"the model's attention implementation is {attends!r} now, which reads no trace; allowed: {NAME!r}, "
                "as the system set it"
            )
        for name, value in self._read_once:
            if (now := vars(self._config).get(name)) != value:
                raise UnsupportedModelError(
                    f"{name} in the model's configuration is {now!r} now, and was {value!r} when the system was made; "
                    "allowed: a new system"
                )
        for router in self._routers:
            # Whoever set the model to training, around this one or not.
            router.training = False
        embedded = inputs_embeds is not None
        inputs = {"inputs_embeds": inputs_embeds[None]} if embedded else {"input_ids": input_ids[None]}
        latent = embedded if latent is None else latent
        watching = [observer(call, latent) for observer in self.observers]
        with self.checkpointing.for_call(latent=latent), self._adapter_of(call):
            output = decoder_of(self.language_model)(
                **inputs,
                position_ids=call.position_ids,
                use_cache=False,
                trace_call=call,
                trace_layers=self.layers,
            )
        hidden, wanted = output.last_hidden_state[0], call.outputs
        # A fused last layer has left the others out already.
        hidden = hidden if wanted is None or len(hidden) == wanted.total else hidden[wanted.index]
        for told in filter(None, watching):
            told(hidden)
        return hidden

    def _adapter_of(self, call: Call) -> contextlib.AbstractContextManager[None]:
        if call.adapter is None:
            return contextlib.nullcontext()
        if call.adapter not in (NONE, *(there := self.model.peft_config)):
            raise ValueError(f"adapter {call.adapter!r} is no longer on the model; allowed: {', '.join(there)}, {NONE}")
        return switch_of(self.language_model).for_call(call)

    def _check_lengths(self, call: Call) -> None:
        """Raise where a row would get frequencies that it would not get alone, or others than its trace has.

        transformers takes those of the longest row of a forward for all of it, and "dynamic" ones also of what it has
        seen before.
        """
        for change in self._changes:
            self._check_limit(call, change)

    def _check_limit(self, call: Call, change: Change) -> None:
        kind, limit, once = change
        positions = call.position_ids[0].tolist()
        if max(positions) < limit:
            return
        rows = zip(call.rows.q_begin.tolist(), call.rows.q_end.tolist(), strict=True)
        found = [(positions[begin], positions[end - 1] + 1) for begin, end in rows if begin < end]
        begins, ends = (sorted(set(column)) for column in zip(*found, strict=True))
        where = f"position {limit}, where frequencies of rope_type {kind!r} change (rows end at {ends})"
        if not once:
            raise UnsupportedModelError(f"the call has a row beyond {where}; allowed: rows up to it")
        if min(ends) <= limit:
            raise UnsupportedModelError(
                f"the call has rows on both sides of {where}; allowed: rows up to it or rows behind it"
            )
        if crossing := [begin for begin in begins if 0 < begin <= limit]:
            raise UnsupportedModelError(
                f"the call goes beyond {where}, and its rows have keys from before it ({crossing} of them); allowed: "
                "rows up to it, or whose first prompt goes beyond it"
            )

    @contextlib.contextmanager
    def observed(self, observer: Observer) -> Iterator[None]:
        """With `observer` among those who are told."""
        self.observers.append(observer)
        try:
            yield
        finally:
            self.observers.remove(observer)


def _uniform(sizes: list[int]) -> int | tuple[int, ...]:
    return sizes[0] if len(set(sizes)) == 1 else tuple(sizes)


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """`module` in evaluation mode, and back."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
