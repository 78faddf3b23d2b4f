"""Training steps of models of the size that is trained in earnest, and the largest batch that fits the memory.

A model this large has no float32 run of the plain way to be checked against, it would not fit: precision is checked
on the same widths with few layers (`checked`), and the whole model's loss and gradients have to be the peer's, where
the peer fits, up to what 16-bit rounding makes of them.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from benchmarks import peers, step
from benchmarks.cases import Step, Work
from benchmarks.experiment import Contender, Experiment, WrongResult, relative_error
from benchmarks.timing import Clock, peak_bytes, race
from diffmas.agents.captured_rollouts import CapturedRollouts
from diffmas.agents.latent_rollouts import step_by_step
from diffmas_ops import KVTrace

#: Layers and batch of the model that is checked; and how far the whole model's results may be from the peer's.
CHECKED_LAYERS, CHECKED_BATCH, ALLOWED = 4, 2, 0.1


def checked(case: Step, device: str) -> Experiment:
    """The step of a model of the same widths with few layers, checked against float32."""
    return step.build(replace(case, layers=min(case.layers, CHECKED_LAYERS), batch=CHECKED_BATCH), device)


def whole(case: Step, device: str, clock: Clock, *, seconds: float) -> dict[str, Any]:
    """Time and memory of the step beside the peer's; what does not fit the memory says so.

    Raises:
        WrongResult: loss or gradients are not the peer's.
    """
    contenders, _ = step.contenders_of(case, device)
    return race_what_fits(
        "step", "step", case, case.step(), contenders, (step.OURS, step.CHECKPOINTED, step.CAPTURED), step.PEER,
        device, clock, seconds=seconds, outputs=("loss", "gradients"),
    )  # fmt: skip


def latent_rollout(case: Step, device: str, clock: Clock, *, seconds: float) -> dict[str, Any]:
    """Forward of one agent's latent steps behind one prompt, as training runs them, against eager transformers."""
    _, twin = step.contenders_of(case, device)
    system, peer = twin.system, twin.model.get_base_model()
    prompt = twin.data[0][0]
    hidden = torch.randn(case.batch, 1, case.hidden, device=device).to(getattr(torch, case.dtype))
    norm = peer.get_input_embeddings().weight.detach().float().norm(dim=-1).mean().to(hidden.dtype)
    lengths = [case.prompt] * case.batch

    runs = CapturedRollouts()

    def replayed() -> KVTrace:
        system.trajectory = replace(system.trajectory, latent_rollout=runs, allocate=runs.allocate)
        return traced()

    def stepwise() -> KVTrace:
        system.trajectory = replace(system.trajectory, latent_rollout=step_by_step, allocate=KVTrace.allocate)
        return traced()

    def run_captured(trace) -> Tensor:
        last = run(trace)
        if not runs.recordings:
            raise RuntimeError("latent rollouts were not captured")
        return last

    def traced() -> KVTrace:
        model = system.agent_model
        trace = system.trajectory.allocate(
            batch=case.batch, capacity=case.prompt + case.latent, backend=model.backend,
            **model.trace_sizes,
        )  # fmt: skip
        with torch.no_grad():
            model.read(trace, lengths, input_ids=prompt.flatten())
        return trace

    def run(trace) -> Tensor:
        system.trajectory.latent_rollout(system.agent_model, case.latent, trace, hidden[:, 0])
        # What the last step but one left: the last one's input is made of it.
        return trace.storage.layer(-1).keys[:, :, case.prompt + case.latent - 2]

    def cached() -> DynamicCache:
        cache = DynamicCache()
        with torch.no_grad():
            peer.get_decoder()(input_ids=prompt, past_key_values=cache, use_cache=True)
        return cache

    def theirs(cache) -> Tensor:
        peers.latent_rollout(peer.get_decoder(), cache, hidden, norm, case.latent)
        return cache.layers[-1].keys[:, :, -2]

    contenders = {
        step.OURS: Contender(run, stepwise, lambda last: (last.detach(),)),
        step.CAPTURED: Contender(run_captured, replayed, lambda last: (last.detach(),)),
        step.PEER: Contender(theirs, cached, lambda last: (last.detach(),)),
    }
    return race_what_fits(
        "latent steps", "forward", case, case.latent_forward(), contenders, (step.OURS, step.CAPTURED), step.PEER,
        device, clock, seconds=seconds, outputs=("last input",),
    )  # fmt: skip


def race_what_fits(
    operator: str,
    direction: str,
    case: Step,
    work: Work,
    contenders: dict[str, Contender],
    implementations: tuple[str, ...],
    peer: str,
    device: str,
    clock: Clock,
    *,
    seconds: float,
    outputs: tuple[str, ...],
) -> dict[str, Any]:
    """Like `experiment.measure`, with the peer's result as the exact one, where it fits the memory.

    A contender that does not run says why; one of ours with a wrong result ends the case.
    """
    rows, expected, laps = {}, None, 0.0
    for name in (peer, *implementations):
        contender, row = contenders[name], {"name": name}
        try:
            begin = time.perf_counter()
            output, row["peak_bytes"] = peak_bytes(contender.run, contender.prepare(), device)
            laps += time.perf_counter() - begin
            result = contender.read(output)
            if expected is not None:
                errors = [relative_error(a, e) for a, e in zip(result, expected, strict=True)]
                row["errors"] = dict(zip(outputs, errors, strict=True))
                if not max(errors) <= ALLOWED:
                    where = f"{operator} {direction}, {case.label}"
                    raise WrongResult(f"{where}: errors of {name} are {row['errors']}; allowed: {ALLOWED}")
            expected = result if name == peer else expected
            output = result = None
        except RuntimeError as error:
            lacking = isinstance(error, torch.OutOfMemoryError)
            row = {"name": name, "unavailable": "out of memory" if lacking else str(error)[:200]}
        rows[name] = row
        free(device)
    racing = [name for name in (*implementations, peer) if "unavailable" not in rows[name]]
    if not racing or racing == [peer]:
        raise RuntimeError(f"{operator} {direction}, {case.label}: ours does not run ({rows[implementations[0]]})")
    timings = race(
        {n: (contenders[n].prepare, contenders[n].run) for n in racing}, clock, seconds=seconds, round_seconds=laps
    )
    for name, timing in timings.items():
        rows[name] |= asdict(timing)
    return {
        "operator": operator,
        "direction": direction,
        "case": asdict(case),
        "label": case.label,
        **asdict(work),
        "ours": racing[0],
        "implementations": implementations,
        "allowed_error": dict.fromkeys(outputs, ALLOWED),
        "contenders": list(rows.values()),
    }


def largest_batch(fits: Callable[[int], bool], limit: int = 512) -> int:
    """The largest batch that fits, to a quarter of itself; 0 where one row does not.

    Doubles until it fits no more, then tries the middle twice.
    """
    low, high = 0, 1
    while high <= limit and fits(high):
        low, high = high, 2 * high
    if high > limit:
        return low
    for _ in range(2):
        middle = (low + high) // 2
        if low < middle < high:
            low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def batches_that_fit(case: Step, device: str, limit: int = 512) -> list[dict[str, Any]]:
    """Per contender, the largest batch whose step fits the memory, and the memory it took."""
    found = []
    for name in (step.OURS, step.CHECKPOINTED, step.PEER):
        peaks: dict[int, int | None] = {}

        def fits(batch: int, name=name, peaks=peaks) -> bool:
            peaks[batch] = _peak(replace(case, batch=batch), name, device)
            free(device)
            return peaks[batch] is not None

        batch = largest_batch(fits, limit)
        found.append({"name": name, "label": case.label, "batch": batch, "peak_bytes": peaks.get(batch)})
    return found


def _peak(case: Step, name: str, device: str) -> int | None:
    """Bytes a step takes beyond the weights, or None where they are not there."""
    try:
        contender = step.contenders_of(case, device)[0][name]
        return peak_bytes(contender.run, contender.prepare(), device)[1]
    except torch.OutOfMemoryError:
        return None


def free(device: str) -> None:
    """Return what nobody holds any more to the device."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
