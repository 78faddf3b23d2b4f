"""Where a training step's time goes: phases, their floors, and a Chrome trace."""

from __future__ import annotations

import contextlib
import inspect
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from diffmas.agents.costs import BACKWARD, PHASES, Shape, Work, floor_seconds
from diffmas.runs.files import PROFILE_FILE
from diffmas.runs.profile import print_profile
from diffmas.support.quiet import quiet_profiler
from diffmas.support.valid_json import to_json
from diffmas.system import MultiAgentSystem
from diffmas.training.ceilings import measure_ceilings
from diffmas.training.memory import plan_of

TRACE_FILE = "trace.json"
OTHER, OPTIMIZER = "other", "optimizer"
#: Steps before the one that is timed; the one after it is traced.
WARM_UP = 1


class Phases:
    """A step's time line: every mark ends a phase and begins the next, so that phases add up to the whole.

    On CUDA the marks are events on the current stream, elsewhere the host's clock.
    """

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, int, torch.cuda.Event | None]] = []

    def __call__(self, name: str) -> None:
        """From now on, time is spent in phase `name`."""
        if self._marks and self._marks[-1][0] == name:
            return
        event = None
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        self._marks.append((name, time.time_ns(), event))

    def spans(self) -> list[tuple[str, int, int]]:
        """Name, begin and end (on the host, ns since 1970) of every phase up to the last mark."""
        return [(a[0], a[1], b[1]) for a, b in zip(self._marks, self._marks[1:], strict=False)]

    def seconds(self) -> dict[str, float]:
        """By phase, up to the last mark."""
        if self._cuda:
            torch.cuda.synchronize()
        total: dict[str, float] = {}
        for (name, begin, start), (_, end, stop) in zip(self._marks, self._marks[1:], strict=False):
            spent = (end - begin) / 1e9 if start is None else start.elapsed_time(stop) / 1e3
            total[name] = total.get(name, 0.0) + spent
        return total


@contextlib.contextmanager
def watch(system: MultiAgentSystem, mark: Callable[[str], None]) -> Iterator[list[tuple[Any, Any]]]:
    """Mark the phases of every forward and backward of `system`; yields the lengths of the batches it sees.

    A call's backward begins when a gradient reaches its hidden states, or the attention of its last layer where only
    later calls used it. What follows a call up to the next one counts as that call's.
    """
    signature = inspect.signature(system.forward)
    batches: list[tuple[Any, Any]] = []
    reads, backward, topology = 0, False, system.topology
    # Prompts, and what comes over bridges before them.
    of_answer = len(topology.agents) + sum(bool(topology.bridged(agent)) for agent in topology.agents)

    def before(module, args, kwargs):
        nonlocal reads
        given = signature.bind(*args, **kwargs).arguments
        batches.append((given["prompt_lengths"], given["answer_lengths"]))
        reads = 0

    def marked(call, latent: bool) -> Callable[[Tensor], None] | None:
        nonlocal reads
        if backward:
            mark(("latent" if latent else "prefill") + BACKWARD)
            return None
        reads += not latent
        name = "latent" if latent else "answer" if reads == of_answer else "prefill"
        mark(name)

        def ran(hidden: Tensor) -> None:
            if hidden.requires_grad:
                hidden.register_hook(lambda grad: mark(name + BACKWARD))
            if (token := call.order_token) is not None and token.grad_fn is not None:
                token.grad_fn.register_prehook(lambda grads: mark(name + BACKWARD))

        return ran

    def after(module, args, output):
        if output.loss.requires_grad:
            output.loss.register_hook(begin_backward)

    def begin_backward(grad):
        nonlocal backward
        backward = True
        mark("answer" + BACKWARD)
        torch.autograd.Variable._execution_engine.queue_callback(end_backward)

    def end_backward():
        nonlocal backward
        backward = False
        mark(OTHER)

    hooks = [system.register_forward_pre_hook(before, with_kwargs=True), system.register_forward_hook(after)]
    try:
        with contextlib.ExitStack() as watching:
            for model in system.models.values():
                watching.enter_context(model.observed(marked))
            yield batches
    finally:
        for hook in hooks:
            hook.remove()


class ProfileStep(TrainerCallback):
    """Times one optimizer step by phase, traces the next, and writes `profile.json` and `trace.json`.

    `trace.json` is for chrome://tracing or ui.perfetto.dev; a track "phases" lies over the operators.
    """

    def __init__(self, system: MultiAgentSystem, autocast: torch.dtype | None = None):
        self.system, self.autocast = system, autocast
        self._stack: contextlib.ExitStack | None = None
        self._steps = 0
        self.result: dict[str, Any] | None = None

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step < getattr(args, "restate_steps", 0):
            return
        self._steps += 1
        if state.is_world_process_zero and WARM_UP < self._steps <= WARM_UP + 2:
            self._stack = contextlib.ExitStack()
            self._profiler = None
            if self._steps == WARM_UP + 2:
                quiet_profiler()
                self._profiler = self._stack.enter_context(torch.profiler.profile())
            _synchronize(args.device)
            self._mark = Phases(args.device)
            self._batches = self._stack.enter_context(watch(self.system, self._mark))
            self._begin = time.perf_counter()
            self._mark(OTHER)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self._stack is not None:
            self._mark(OPTIMIZER)

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self._stack is not None:
            self._mark(OTHER)

    def on_step_end(self, args, state, control, **kwargs):
        if self._stack is None:
            return
        self._mark("end")
        _synchronize(args.device)
        seconds = time.perf_counter() - self._begin
        self._stack.close()
        self._stack = None
        if self._profiler is None:
            self.result = self._summarise(seconds, args.device)
            Path(args.output_dir, PROFILE_FILE).write_text(to_json(self.result, indent=2) + "\n")
            print_profile(self.result)
        else:
            write_trace(self._profiler, self._mark.spans(), Path(args.output_dir, TRACE_FILE))

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero and self._steps < WARM_UP + 2:
            print(f"--profile: needs {WARM_UP + 2} steps, {self._steps} were made; nothing or not all was written")

    def _summarise(self, seconds: float, device: torch.device) -> dict[str, Any]:
        dtype = self.autocast or self.system.agent_model.language_model.dtype
        shapes = {name: Shape.of(model, self.autocast) for name, model in self.system.models.items()}
        mode = self.system.checkpointing
        plans = [plan_of(self.system, *batch) for batch in self._batches]
        work = {name: Work() for phase in PHASES for name in (phase, phase + BACKWARD)}
        for plan in plans:
            for name, more in plan.work(shapes, mode).items():
                work[name] += more
        matmul, copy = measure_ceilings(device, dtype)
        spent = self._mark.seconds()
        flops = sum(w.flops for plan in plans for w in plan.work(shapes).values())
        tokens = sum(call.tokens for plan in plans for call in plan.calls)
        floor = floor_seconds(work, matmul, copy)
        return {
            "seconds": seconds,
            "micro_batches": len(plans),
            "checkpointing": mode,
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "model_flops": flops,
            "model_flops_utilisation": flops / seconds / matmul,
            "floor_seconds": floor,
            "floor_ratio": floor / seconds,
            "matmul_flops_per_second": matmul,
            "copy_bytes_per_second": copy,
            "dtype": str(dtype).removeprefix("torch."),
            "phases": {
                name: {"seconds": spent.get(name, 0.0)}
                | ({"floor_seconds": work[name].seconds(matmul, copy)} if name in work else {})
                for name in (*work, OPTIMIZER, OTHER)
            },
        }


def write_trace(profiler: torch.profiler.profile, spans: list[tuple[str, int, int]], path: Path) -> None:
    """The profiler's Chrome trace with `spans` (name, begin, end in ns since 1970) as a track of their own."""
    profiler.export_chrome_trace(str(path))
    trace = json.loads(path.read_text())
    base = trace.get("baseTimeNanoseconds", 0)
    trace["traceEvents"] += [
        {"ph": "X", "cat": "phase", "name": name, "pid": "phases", "tid": "phases", "ts": (begin - base) / 1e3,
         "dur": (end - begin) / 1e3}
        for name, begin, end in spans
    ]  # fmt: skip
    path.write_text(to_json(trace))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
