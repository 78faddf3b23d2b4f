"""Latent rollouts, and their backward, that replay as CUDA graphs (`cuda_graphs = "auto"`).

A latent step launches some twenty small kernels a layer for one token a row: at small batches the launching takes
longer than the kernels. A rollout's shapes never change (m calls of one token a row) and where in its trace it stands
is read on the device, so it is recorded once, forward and backward, and replayed from then on.

A recording reads and writes where it did when it was made. So traces are leased from a pool by sizes, their capacities
rounded up, and a rollout has its own recording for each set of buffers and each position in a trajectory (several
rollouts are alive until the backward). A trajectory gives its buffers back when its loss is let go of. What Python does
between the launches is done beside the recording: the trace's lengths, the order of calls, the rows that are deferred.

Not yet run on a GPU. The tests run everything but the graphs themselves on the CPU (:class:`Eager`).
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from diffmas.agents.latent_rollouts import step_by_step
from diffmas.models.agent_model import AgentModel
from diffmas_ops import KVTrace
from diffmas_ops.call import Streak
from diffmas_ops.gradients import TraceGradients
from diffmas_ops.storage import Stack, TraceStorage

CUDA_GRAPHS = ("off", "auto")
#: Capacities are multiples of this, so that batches of other lengths meet the same recordings.
BUCKET = 256
#: Recordings that are kept, each with the memory of a rollout's activations; the oldest goes.
MOST_RECORDINGS = 64

#: Work on fixed tensors that returns its results. Replayed, they are in the same tensors every time.
Body = Callable[[], list[Tensor | None]]


def asks_for_graphs(cuda_graphs: str, latent_backward: str) -> bool:
    """Whether these settings ask for captured rollouts.

    Raises:
        ValueError: an unknown setting, or captured rollouts with a latent backward other than "exact".
    """
    if cuda_graphs not in CUDA_GRAPHS:
        raise ValueError(f"cuda_graphs is {cuda_graphs!r}; allowed: {', '.join(CUDA_GRAPHS)}")
    if cuda_graphs == "auto" and latent_backward != "exact":
        raise ValueError(f"latent_backward is {latent_backward!r} with cuda_graphs 'auto'; allowed: exact")
    return cuda_graphs == "auto"


def _adapters(model: nn.Module) -> list[tuple]:
    """Which adapters are in force, layer by layer: a recording has computed with them."""
    layers = (m for m in model.modules() if isinstance(m, BaseTunerLayer))
    return [(m.disable_adapters, *m.active_adapters, *m.merged_adapters) for m in layers]


class Eager:
    """Runs a body every time, and puts its results where those of the first time lay, as a graph does."""

    def record(self, bodies: Sequence[Body]) -> list[Body]:
        """Replays of `bodies`, which run in their order; each is run for warming up first."""
        for body in bodies:
            body()
        return [self._again(body) for body in bodies]

    @staticmethod
    def _again(body: Body) -> Body:
        kept: list[Tensor | None] = []

        @torch.no_grad()
        def replay() -> list[Tensor | None]:
            results = body()
            if not kept:
                kept.extend(results)
            for old, new in zip(kept, results, strict=True):
                if old is not None:
                    old.copy_(new)
            return kept

        return replay


class CudaGraphs:
    """Captures bodies as CUDA graphs that share a memory pool."""

    WARM_UP = 3

    def record(self, bodies: Sequence[Body]) -> list[Body]:
        """See :meth:`Eager.record`."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(self.WARM_UP):
                for body in bodies:
                    body()
        torch.cuda.current_stream().wait_stream(aside)
        pool = torch.cuda.graph_pool_handle()
        return [self._capture(body, pool) for body in bodies]

    @staticmethod
    def _capture(body: Body, pool) -> Body:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            results = body()

        def replay() -> list[Tensor | None]:
            graph.replay()
            return results

        return replay


class _Buffers:
    """Keys, values and their gradients, at addresses that stay."""

    def __init__(self, storage: TraceStorage):
        self.stacks = storage.stacks
        self._storage = storage
        self._accumulators: list[Stack] = []

    @property
    def accumulators(self) -> list[Stack]:
        if not self._accumulators:
            self._accumulators = self._storage.new_accumulators()
        return self._accumulators


class _Leased(TraceStorage):
    """A trace's buffers for as long as its trajectory lives; `rollouts`: those it has seen."""

    def __init__(self, buffers: _Buffers):
        super().__init__(buffers.stacks)
        self.buffers, self.rollouts, self._given = buffers, 0, False

    def new_accumulators(self) -> list[Stack]:
        if self._given:
            return super().new_accumulators()
        self._given = True
        for accumulator in self.buffers.accumulators:
            for x in accumulator:
                x.zero_()
        return self.buffers.accumulators


class _Recorded(TraceStorage):
    """The buffers as a recording sees them."""

    def __init__(self, buffers: _Buffers):
        super().__init__(buffers.stacks)
        self._buffers = buffers

    def new_accumulators(self) -> list[Stack]:
        return self._buffers.accumulators


class _Recording:
    """The latent steps of one position in a trajectory, on one set of buffers, recorded.

    `hidden [batch, hidden]` and `starts [batch]` are where a replay reads from; `deferred` are the rows that the
    backward leaves to be added to older columns.
    """

    def __init__(
        self,
        model: AgentModel,
        steps: int,
        storage: _Leased,
        hidden: Tensor,
        starts: Tensor,
        parameters: Sequence[Tensor],
        recording: bool,
        executor: Eager | CudaGraphs,
    ):
        self._model, self._steps = weakref.ref(model), steps
        self._recording, self._parameters = recording, list(parameters)
        self._hidden = hidden.detach().clone().requires_grad_(recording)
        # The last columns a rollout can start at: launches are sized for them, and read the real ones on the device.
        self._latest = [storage.capacity - steps] * len(hidden)
        self._trace = KVTrace(_Recorded(storage.buffers), self._latest, grow=False, backend=model.backend)
        self._starts = starts.clone()
        self.deferred: dict | None = None
        self._forward, *backward = executor.record([self._step, self._differentiate][: 1 + recording])
        self._backward = backward[0] if recording else None

    def forward(self, hidden: Tensor, starts: Tensor) -> None:
        with torch.no_grad():
            self._hidden.copy_(hidden)
            self._starts.copy_(starts)
        self._forward()

    def backward(self) -> list[Tensor | None]:
        """Gradients of `hidden` and of the parameters; the next replay writes over them."""
        results = self._backward()
        if self.deferred is None:
            self.deferred = self._rows
        return results[: 1 + len(self._parameters)]

    def _step(self) -> list[Tensor]:
        trace = self._trace
        trace.host_lengths, trace.lengths = self._latest, self._starts
        trace.detach_()
        with torch.set_grad_enabled(self._recording):
            step_by_step(self._model(), self._steps, trace, self._hidden)
        self._order = trace.order.token
        return []

    def _differentiate(self) -> list[Tensor | None]:
        leaves = [self._hidden, *self._parameters]
        root, self._order = self._order, None
        gradients = torch.autograd.grad(root, leaves, torch.zeros_like(root), allow_unused=True)
        self._rows = self._trace.gradients.deferred()
        return [*gradients, *(x for rows in self._rows.values() for x in rows.tensors)]


@dataclass(frozen=True)
class _Place:
    """Where in its trajectory a replayed rollout stands: its trace's gradients, and columns behind its last step."""

    recording: _Recording
    gradients: TraceGradients
    skipped: Streak
    ends: Tensor
    max_seqlen_k: int


class _Replay(torch.autograd.Function):
    """A rollout in the order of calls: parameters are inputs, and their gradients results of the recorded backward."""

    @staticmethod
    def forward(ctx, order, hidden, place, starts, *parameters):
        ctx.place = place
        place.recording.forward(hidden, starts)
        ctx.set_materialize_grads(False)
        return order.new_empty(0)

    @staticmethod
    def backward(ctx, *_):
        place: _Place = ctx.place
        # Rows that single-token calls right behind this rollout have deferred; its own take their place.
        place.gradients.flush_all(place.ends, place.max_seqlen_k)
        hidden, *parameters = place.recording.backward()
        place.gradients.defer(place.recording.deferred, place.skipped)
        # The very tensors a replay writes: autograd copies what is held elsewhere, and adds out of place.
        return None, hidden, None, None, *parameters


class CapturedRollouts:
    """A :data:`~diffmas.agents.latent_rollouts.LatentRollout` that replays; where it cannot, step by step, warned of.

    Not captured: steps that are profiled, models with recurrent layers, under autocast, with latent steps that are
    checkpointed, with sharded parameters; traces that grow (decoding), or whose gradient was cut in between; devices
    other than `devices`.

    Args:
        executor: makes what records a rollout.
        bucket: capacities of traces are multiples of it.
    """

    def __init__(
        self,
        executor: Callable[[], Eager | CudaGraphs] = CudaGraphs,
        *,
        devices: Sequence[str] = ("cuda",),
        bucket: int = BUCKET,
    ):
        self._executor, self._devices, self._bucket = executor, devices, bucket
        self._free: dict[tuple, list[_Buffers]] = {}
        self._recordings: dict[tuple, _Recording | None] = {}
        self._warned: set[str] = set()

    def allocate(
        self, *, capacity: int, device: torch.device | str, grow: bool = False, backend: str = "auto", **sizes
    ) -> KVTrace:
        """Like :meth:`KVTrace.allocate`; a trace of this pool has a capacity of whole buckets."""
        options = dict(device=device, backend=backend, **sizes)
        if grow or torch.device(device).type not in self._devices:
            return KVTrace.allocate(capacity=capacity, grow=grow, **options)
        capacity = -(-capacity // self._bucket) * self._bucket
        free = self._free.setdefault((capacity, torch.device(device), *sorted(sizes.items())), [])
        buffers = free.pop() if free else _Buffers(KVTrace.allocate(capacity=capacity, **options).storage)
        storage = _Leased(buffers)
        weakref.finalize(storage, free.append, buffers)
        return KVTrace(storage, [0] * sizes["batch"], grow=False, backend=backend)

    @property
    def recordings(self) -> int:
        """How many rollouts have been recorded."""
        return sum(found is not None for found in self._recordings.values())

    def __call__(self, model: AgentModel, steps: int, trace: KVTrace, hidden: Tensor) -> list[Tensor] | None:
        parameters = [p for p in model.parameters() if p.requires_grad]
        differentiable = hidden.requires_grad or trace.order.token.requires_grad or parameters
        recording = torch.is_grad_enabled() and bool(differentiable)
        recorded = self._find(model, steps, trace, hidden, parameters if recording else [], recording)
        if recorded is None:
            return step_by_step(model, steps, trace, hidden)
        starts = trace.lengths
        skipped = trace.skip(steps)
        if not recording:
            recorded.forward(hidden, starts)
            return None
        place = _Place(recorded, trace.gradients, skipped, trace.lengths, max(trace.host_lengths))
        token = _Replay.apply(trace.order.token, hidden, place, starts, *parameters)
        trace.order.advance(token, trace.host_lengths)
        return None

    def _find(
        self,
        model: AgentModel,
        steps: int,
        trace: KVTrace,
        hidden: Tensor,
        parameters: list[Tensor],
        recording: bool,
    ) -> _Recording | None:
        """The recording of this rollout, made now where it is the first of its kind; or None."""
        storage = trace.storage
        if not isinstance(storage, _Leased):
            return None
        position = storage.rollouts
        storage.rollouts += 1
        if (reason := self._refusal(model, trace, parameters, recording)) is not None:
            return self._warn(reason)
        key = (
            id(storage.buffers), position, steps, hidden.dtype, model.training, recording,
            *(p.data_ptr() for p in parameters), *_adapters(model.model), getattr(model, "adapter", None),
        )  # fmt: skip
        if key not in self._recordings:
            while len(self._recordings) >= MOST_RECORDINGS:
                self._recordings.pop(next(iter(self._recordings)))
            try:
                self._recordings[key] = _Recording(
                    model, steps, storage, hidden, trace.lengths, parameters, recording, self._executor()
                )  # fmt: skip
            except RuntimeError as error:
                self._recordings[key] = self._warn(f"{type(error).__name__}: {error}")
        return self._recordings[key]

    def _refusal(self, model: AgentModel, trace: KVTrace, parameters: list[Tensor], recording: bool) -> str | None:
        if model.observers:
            # Profiling marks every call; a replay makes none.
            return "calls are watched"
        if model.recurrent:
            return f"the model has recurrent layers ({model.recurrent})"
        if torch.is_autocast_enabled(trace.device.type):
            return "autocast is enabled"
        if model.checkpointing.mode == "all" and recording:
            return "activations of latent steps are checkpointed"
        if any(type(p.data).__name__ == "DTensor" for p in parameters):
            return "the parameters are sharded"
        if recording and trace.gradients.accumulators() is not trace.storage.buffers.accumulators:
            return "the trace's gradient was cut before"
        return None

    def _warn(self, reason: str) -> None:
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(f"latent rollouts are taken step by step, not captured: {reason}", stacklevel=4)
