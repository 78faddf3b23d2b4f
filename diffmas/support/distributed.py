"""Several processes: what one decides for all, what they share out, and what a sharded model (FSDP2) needs.

Everything here is a no-op in a single process.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainingArguments

T = TypeVar("T")


def processes() -> int:
    """Number of processes training or evaluating together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if processes() > 1 else 0


def decided_by_first(decide: Callable[[], T]) -> T:
    """What `decide()` returns in process 0, in all of them; what it raises there is raised everywhere."""
    if processes() == 1:
        return decide()
    outcome: list[Any] = [None, None]
    if process() == 0:
        try:
            outcome[0] = decide()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is set in any process; all of them must ask."""
    if processes() == 1:
        return flag
    flags = torch.tensor(flag, dtype=torch.int32, device=device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


def gathered(items: list[T]) -> list[T]:
    """The items of all processes, in every process."""
    if processes() == 1:
        return items
    parts: list[Any] = [None] * processes()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def asked_sharding(args: TrainingArguments) -> str | None:
    """By what name a flag, or a launcher's environment, asks for weights (or their optimizer) in parts; None: whole."""
    flags = {"FSDP": args.fsdp, "DEEPSPEED": args.deepspeed, "PARALLELISM_CONFIG": args.parallelism_config}
    names = (*flags, "MEGATRON_LM")
    return next((n for n in names if flags.get(n) or parse_flag_from_env(f"ACCELERATE_USE_{n}")), None)


def settle_sharding(args: TrainingArguments) -> bool:
    """What sharding by a launcher's or transformers' flags means here: FSDP2, layer by layer. Whether it is asked for.

    Raises:
        ValueError: FSDP1, or only one process loading the weights.
    """
    flags = getattr(args, "fsdp_plugin_args", None)
    if flags is None and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    flags = flags or {}
    if (version := int(flags.get("fsdp_version", os.environ.get("FSDP_VERSION", "1")))) != 2:
        raise ValueError(f"fsdp_version is {version}; allowed: 2")
    if flags.get("cpu_ram_efficient_loading"):
        raise ValueError("cpu_ram_efficient_loading is true; allowed: false, every process measures the embedding")
    # The launcher's default is true.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    os.environ.setdefault("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    if args.device.type == "cpu" and processes() > 1:
        # accelerate shards on accelerators alone and would quietly copy the model to every process here.
        Accelerator(mixed_precision="no", cpu=True).state.fsdp_plugin = FullyShardedDataParallelPlugin(**flags)
        PartialState().distributed_type = DistributedType.FSDP
    return True


def is_sharded(system: nn.Module) -> bool:
    """Whether FSDP2 shards the parameters of `system`."""
    return isinstance(system, FSDPModule)


@contextlib.contextmanager
def root_unsharded(system: nn.Module) -> Iterator[None]:
    """Parameters outside the layers (embeddings, head, alignment) are whole, as inside `system.forward`."""
    if not is_sharded(system):
        yield
        return
    system.unshard()
    try:
        yield
    finally:
        system.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A sharded parameter's full value; all processes must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(full: Tensor, parameter: Tensor) -> Tensor:
    """`full` sharded as `parameter` is; every process holds all of it."""
    if not isinstance(parameter, DTensor):
        return full
    full = full.to(parameter.device)
    return distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)


class _Reach(torch.autograd.Function):
    @staticmethod
    def forward(ctx, order, hidden):
        ctx.hidden = hidden.shape, {"dtype": hidden.dtype, "device": hidden.device}
        ctx.set_materialize_grads(False)
        return order.new_empty(0)

    @staticmethod
    def backward(ctx, _):
        shape, options = ctx.hidden
        return None, torch.zeros(shape, **options)


def reach(order: Tensor, hidden: Tensor) -> Tensor:
    """The order token `order`, whose backward also reaches `hidden`, with a gradient of zero.

    FSDP2 gathers a layer's parameters for the backward when the gradient of its output arrives. The last layer of an
    agent's last call has an output nobody uses, while its keys and values do get gradients.
    """
    return _Reach.apply(order, hidden)
