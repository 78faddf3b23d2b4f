"""Launchers: processes that do not see each other, or are asked for what one process does, are an error."""

import pytest
import torch
from accelerate.state import AcceleratorState

from diffmas import ablate, chat, train
from diffmas import eval as evaluate
from diffmas.support import launch
from diffmas.training.settings import TrainArguments

VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TOGETHER = dict(zip(VARIABLES, ("2", "1", "1", "2", "localhost", "1"), strict=True))


@pytest.fixture
def launched(monkeypatch):
    """`launched(**environment)`: as a launcher would set it, and nothing else."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    yield lambda **environment: [monkeypatch.setenv(name, value) for name, value in environment.items()]
    AcceleratorState._reset_state(True)


@pytest.fixture
def refused(flags, capsys, monkeypatch):
    """`refused(main, arguments)`: the line a program ends with, before it has loaded a model."""
    monkeypatch.setattr("diffmas.training.session.build_system", lambda *_: pytest.fail("a model is loaded"))

    def line(main=train.main, arguments=None):
        assert main(flags() if arguments is None else arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error.partition("error: ")[2]

    return line


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (dict(WORLD_SIZE="2"), "WORLD_SIZE is 2, but RANK, MASTER_ADDR, MASTER_PORT is not set"),
        (dict(WORLD_SIZE="2", RANK="0"), "WORLD_SIZE is 2, but MASTER_ADDR, MASTER_PORT is not set"),
        (dict(WORLD_SIZE="two"), "WORLD_SIZE is 'two' in the environment; allowed: integers"),
        (dict(RANK="1"), "RANK is 1, but this is process 0"),
        (dict(ACCELERATE_USE_DEEPSPEED="true"), "ACCELERATE_USE_DEEPSPEED is true; allowed: false"),
        (dict(ACCELERATE_USE_MEGATRON_LM="true"), "ACCELERATE_USE_MEGATRON_LM is true; allowed: false"),
        (dict(ACCELERATE_USE_PARALLELISM_CONFIG="true"), "ACCELERATE_USE_PARALLELISM_CONFIG is true; allowed: false"),
        (dict(ACCELERATE_DYNAMO_BACKEND="INDUCTOR"), "ACCELERATE_DYNAMO_BACKEND is 'INDUCTOR'; allowed: no"),
        (
            dict(ACCELERATE_GRADIENT_ACCUMULATION_STEPS="4"),
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS is 4, gradient_accumulation_steps is 2",
        ),
        (dict(ACCELERATE_MIXED_PRECISION="fp16"), "mixed_precision is 'fp16'; allowed: --bf16 True"),
        (dict(ACCELERATE_MIXED_PRECISION="fp8"), "mixed_precision is 'fp8'; allowed: --bf16 True"),
    ],
    ids=str,
)
def test_environments(launched, refused, environment, message):
    launched(**environment)
    assert refused().startswith(message)


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"])
def test_processes_that_do_not_see_each_other(launched, refused, monkeypatch, variable):
    """Each would train by itself, as the first of them all."""
    monkeypatch.setattr(launch, "on_cpu", lambda: False)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    launched(**{"RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1", variable: "2"})
    for main, arguments in ((train.main, []), (evaluate.main, ["--run=nowhere"])):
        assert refused(main, arguments).startswith(f"{variable} is 2, but this process acts with 1; allowed: all")


def test_a_group_of_another_size(launched, refused, tmp_path):
    """One process whose launcher's variables change under it."""
    launched(**TOGETHER | dict(WORLD_SIZE="1", RANK="0", LOCAL_RANK="0", MASTER_PORT="0"))
    launch.join()
    try:
        launched(WORLD_SIZE="2")
        assert refused().startswith("WORLD_SIZE is 2, but this process acts with 1; allowed: all")
    finally:
        torch.distributed.destroy_process_group()


def test_more_processes_than_gpus(launched, refused, monkeypatch):
    monkeypatch.setattr(launch, "on_cpu", lambda: False)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    launched(**TOGETHER)
    assert refused(arguments=[]).startswith("2 processes were started here, where 1 GPUs are visible; allowed: one a")


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (evaluate.main, ["--run=nowhere", "--methods=all"]),
        (ablate.main, ["--run=nowhere", "--latent_steps=0,1"]),
        (chat.main, ["--run=nowhere"]),
    ],
    ids=["methods", "ablate", "chat"],
)
def test_what_one_process_does(launched, refused, main, arguments):
    launched(**TOGETHER)
    assert refused(main, arguments).startswith("WORLD_SIZE is 2; allowed: 1, ")


@pytest.mark.parametrize("backend", ["nccl", "mpi"])
def test_backends_on_a_cpu(launched, refused, flags, backend):
    launched(**TOGETHER)
    error = refused(arguments=flags(ddp_backend=backend))
    assert error.startswith(f"ddp_backend is '{backend}' on a CPU; allowed: gloo")


def test_a_rank_of_another_launcher(launched, refused, flags):
    launched(**TOGETHER)
    assert refused(arguments=flags(local_rank=0)).startswith("local_rank is 0, LOCAL_RANK is 1; allowed: what torchrun")


def test_one_process_takes_one_gpu(tmp_path, monkeypatch):
    """transformers would copy the model to all of them, and multiply the batch."""
    monkeypatch.setattr(launch, "on_cpu", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    args = TrainArguments(output_dir=str(tmp_path), per_device_train_batch_size=3)
    assert (args.n_gpu, args.train_batch_size) == (1, 3)
