"""On which device a program runs, and with which other processes: settled before transformers and accelerate are."""

from __future__ import annotations

import atexit
import functools
import gc
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments

from diffmas.support.distributed import process, processes

#: Where torchrun and the launchers of MPI libraries say how many processes they have started.
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
#: How processes find each other, beside their number.
_MEETING = ("RANK", "MASTER_ADDR", "MASTER_PORT")
#: Engines an `accelerate launch` can ask for that know nothing of a multi-agent system.
_ENGINES = ("DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")


def launched() -> tuple[str, int]:
    """The variable by which a launcher says how many processes it has started, and their number; 1 without one."""
    name = next((n for n in _SIZES if os.environ.get(n)), _SIZES[0])
    return name, _integer(name, 1)


def on_cpu() -> bool:
    """Whether the processor is all there is, or what a launcher has asked for."""
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def settle_processes(args: TrainingArguments) -> None:
    """Before transformers looks: the processor where there is nothing else, and processes that find each other there.

    Raises:
        ValueError: more processes than GPUs, or something else that would be ignored.
    """
    args.use_cpu = args.use_cpu or on_cpu()
    name, number = launched()
    if args.ddp_backend is not None and number == 1:
        raise ValueError(f"ddp_backend is {args.ddp_backend!r}; allowed: only with several processes (torchrun)")
    if args.ddp_backend not in (None, "gloo") and args.use_cpu:
        raise ValueError(f"ddp_backend is {args.ddp_backend!r} on a CPU; allowed: gloo")
    if args.local_rank not in (-1, rank := _integer("LOCAL_RANK", -1)):
        raise ValueError(f"local_rank is {args.local_rank}, LOCAL_RANK is {rank}; allowed: what torchrun sets")
    if engine := next((n for n in _ENGINES if parse_flag_from_env(f"ACCELERATE_USE_{n}")), None):
        raise ValueError(f"ACCELERATE_USE_{engine} is true; allowed: false, weights are sharded with --use_fsdp")
    if (backend := os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")).lower() != "no":
        raise ValueError(f"ACCELERATE_DYNAMO_BACKEND is {backend!r}; allowed: no, the layers are fused already")
    steps = _integer("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", 1)
    if steps not in (1, args.gradient_accumulation_steps):
        raise ValueError(
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS is {steps}, gradient_accumulation_steps is "
            f"{args.gradient_accumulation_steps}; allowed: the program's own argument"
        )
    _join(args.use_cpu, timedelta(seconds=args.ddp_timeout))


def check_processes(seen: int) -> None:
    """Raise `ValueError` unless the `seen` processes that act together are those that a launcher has started."""
    if seen > 1:
        _leave_in_order()
    name, number = launched()
    if not number == seen == processes():
        raise ValueError(
            f"{name} is {number}, but this process acts with {seen}; allowed: all processes of torchrun or accelerate "
            f"launch, or {name} left out"
        )
    if (rank := _integer("RANK", process())) != process():
        raise ValueError(f"RANK is {rank}, but this is process {process()}; allowed: what the launcher sets")


def join() -> torch.device:
    """The device of this process; started with others by a launcher, it acts together with them from here on.

    Raises:
        ValueError: it does not see them.
    """
    cpu = on_cpu()
    _join(cpu, timedelta(minutes=30))
    state = PartialState(cpu=cpu)
    check_processes(state.num_processes)
    return state.device


def check_alone(what: str) -> None:
    """Raise `ValueError` where a launcher has started several processes for `what`, which one does."""
    name, number = launched()
    if number > 1:
        raise ValueError(f"{name} is {number}; allowed: 1, {what} runs in one process")


def _join(cpu: bool, timeout: timedelta) -> None:
    name, number = launched()
    if number == 1:
        return
    local, devices = _integer("LOCAL_WORLD_SIZE", 1), torch.accelerator.device_count()
    if not cpu and local > devices:
        raise ValueError(f"{local} processes were started here, where {devices} GPUs are visible; allowed: one a GPU")
    if name == "WORLD_SIZE" and (missing := [n for n in _MEETING if not os.environ.get(n)]):
        raise ValueError(f"WORLD_SIZE is {number}, but {', '.join(missing)} is not set; allowed: what torchrun sets")
    # Here, since transformers hands over no timeout on a CPU, and accelerate would rather take MPI.
    if cpu and name == "WORLD_SIZE" and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timeout)


def _integer(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name} is {text!r} in the environment; allowed: integers") from None


@functools.cache
def _leave_in_order() -> None:
    """End the process group when the process ends: threads that it still has would abort the process."""

    def leave() -> None:
        # What holds on to the group, in circles, goes first.
        gc.collect()
        if dist.is_initialized():
            dist.destroy_process_group()

    atexit.register(leave)
