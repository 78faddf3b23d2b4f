"""Shared fixtures: backends to test, poisoned buffers, a hypothesis profile that repeats itself."""

import gc
import os
import sys

if "PYTEST_XDIST_WORKER" in os.environ:
    # Several processes share the cores; said before torch reads it.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import interpreted  # noqa: F401  (before Triton)

# isort: split
import diffmas_ops  # noqa: F401  (before torch; see diffmas_ops.threads)

# isort: split
import pytest
import torch
from hypothesis import HealthCheck, settings


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """The whole suite, `pytest` without a path, runs in several processes; `-n 0` turns that off."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        # This hook is called in the workers too, which would start workers of their own without end.
        return
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    if whole and getattr(config.option, "numprocesses", 0) is None:
        config.option.numprocesses = min(4, os.cpu_count() or 1)
        config.option.dist = "worksteal"


def pytest_collection_finish():
    """What was imported is not looked through again at every collection; many tests ask for one."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    # Libraries count what they find left at the end.
    gc.unfreeze()


settings.register_profile("repeatable", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
settings.load_profile("repeatable")


@pytest.fixture(params=["reference", "auto"])
def backend(request):
    return request.param


@pytest.fixture
def confinement():
    """Skips where a user may not confine programs; root on Linux always can."""
    from diffmas.sandbox import SandboxError, best_mode

    try:
        best_mode()
    except SandboxError as error:
        if sys.platform == "linux" and os.geteuid() == 0:
            raise
        pytest.skip(str(error))


@pytest.fixture
def poison():
    """Every buffer allocated without a value starts as NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all(), "torch.utils.deterministic.fill_uninitialized_memory is off"
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """Folder of a tiny random base model with the embedded base's tokenizer."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from diffmas.embedded.tokenizer import build_tokenizer

    folder = tmp_path_factory.mktemp("base")
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def flags(base, tmp_path):
    """`flags(**changes)`: the command line of a 6-step relay run into `tmp_path / "run"`."""

    def build(**changes):
        return _as_flags(_RUN | dict(model=base, output_dir=tmp_path / "run") | changes)

    return build


@pytest.fixture
def team_flags(base, tmp_path):
    """`team_flags(**changes)`: what a comparison takes; 3 agents, 2 latent steps, 4 training steps, 5 items."""

    def build(**changes):
        (tmp_path / "team.yaml").write_text(_TEAM)
        return _as_flags(_RUN | _OF_TEAM | dict(model=base, topology=tmp_path / "team.yaml") | changes)

    return build


#: A run that ends in seconds.
_RUN = dict(
    task="relay", topology="relay", latent_steps=2, max_steps=6, learning_rate=1e-2, per_device_train_batch_size=4,
    gradient_accumulation_steps=2, per_device_eval_batch_size=4, eval_size=9, max_new_tokens=3, temperature=0,
    save_steps=2, disable_tqdm=True, use_cpu=True,
)  # fmt: skip
#: Two senders and a solver, which sample.
_OF_TEAM = dict(max_steps=4, gradient_accumulation_steps=1, eval_size=5, temperature=0.8, top_p=0.9, disable_tqdm=None)
_TEAM = """name: team
handover: latent
agents:
  - {name: first, role: sender}
  - {name: second, role: sender, receives: [first]}
  - {name: solver, receives: [second]}
"""


def _as_flags(values):
    return [f"--{name}={value}" for name, value in values.items() if value is not None]
