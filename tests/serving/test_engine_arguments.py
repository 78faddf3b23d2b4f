"""What an evaluation on vLLM refuses before anything runs, with or without vLLM."""

from importlib.util import find_spec

import pytest

from diffmas import eval as evaluate
from diffmas.evaluation.settings import EvalArguments


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(engine="vLLM"), "engine is 'vLLM'; allowed: diffmas, vllm"),
        (dict(engine_args="{}"), "engine_args is '{}'; allowed: only with --engine vllm"),
        (dict(trace_dir="/dev/shm"), "trace_dir is '/dev/shm'; allowed: only with --engine vllm"),
        (dict(max_trace_gb=1.0), "max_trace_gb is 1.0; allowed: only with --engine vllm"),
        (dict(engine="vllm", engine_args="[1]"), r"engine_args is '\[1\]'; allowed: a JSON object"),
        (dict(engine="vllm", engine_args="{"), "engine_args is '{'; allowed: a JSON object"),
        (dict(engine="vllm", engine_args='{"model": "x"}'), r"engine options have \['model'\], which are settled"),
        (dict(engine="vllm", max_trace_gb=0.0), "max_trace_gb is 0.0; allowed: > 0"),
    ],
)
def test_refused(given, message):
    with pytest.raises(ValueError, match=message):
        EvalArguments(run="somewhere", **given).check_used()


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm(capsys):
    assert evaluate.main(["--run=somewhere", "--engine=vllm"]) == 2
    assert "vLLM is not installed; allowed: an environment of its own with it" in capsys.readouterr().err
