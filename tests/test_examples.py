"""Every example, and every Python block of the README, does what it says."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))


@pytest.fixture
def example(request, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    spec = importlib.util.spec_from_file_location(request.param, ROOT / "examples" / f"{request.param}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, request.param, module)
    spec.loader.exec_module(module)
    return module


def test_all_examples_are_tested():
    tested = {"train_and_ask", "own_team", "own_checker", "custom_latent_rollout", "trace_without_transformers"}
    assert set(EXAMPLES) == tested


@pytest.mark.parametrize("example", ["train_and_ask"], indirect=True)
def test_train_and_ask(example, capsys):
    example.main(steps=4)
    said = capsys.readouterr().out
    assert "'eval_accuracy'" in said and "Recall B" in said.splitlines()[-1]
    assert json.loads(Path("runs/ask/system.json").read_text())["system"]["latent_steps"] == 4


@pytest.mark.parametrize("example", ["own_team"], indirect=True)
def test_own_team(example, capsys):
    example.main(steps=3)
    assert "apple 2, saw 2: " in capsys.readouterr().out


@pytest.mark.parametrize("example", ["own_checker"], indirect=True)
def test_own_checker(example, capsys):
    example.main()
    verdicts = [line.rpartition(": ")[2] for line in capsys.readouterr().out.splitlines()]
    assert verdicts[-4:] == ["True", "True", "False", "False"]


@pytest.mark.parametrize("example", ["custom_latent_rollout"], indirect=True)
def test_custom_latent_rollout(example, capsys):
    example.main()
    losses = re.findall(r"loss ([0-9.]+)", capsys.readouterr().out)
    assert len(losses) == 2 and losses[0] != losses[1]


class TestTraceWithoutTransformers:
    NAME = pytest.mark.parametrize("example", ["trace_without_transformers"], indirect=True)

    @NAME
    def test_it_learns(self, example):
        losses = example.train()
        assert losses[0] > 1.5 and losses[-1] < 0.1

    @NAME
    def test_it_cannot_learn_without_the_trace(self, example, monkeypatch):
        monkeypatch.setattr(example, "cached_attention", lambda q, k, v, call, layer: 0 * q)
        assert example.train()[-1] > 1.5

    @NAME
    def test_it_is_short_and_free_of_transformers(self, example):
        text = Path(example.__file__).read_text()
        assert len(text.splitlines()) <= 40 and "transformers" not in text


def test_python_of_the_readme(monkeypatch, tmp_path, base):
    """Its blocks, one behind the other, on a tiny model instead of the one they name and a few steps."""
    from diffmas import train

    monkeypatch.chdir(tmp_path)
    assert train.main(["--max_steps=2", "--eval_size=16", "--disable_final_eval", "--output_dir=runs/relay"]) == 0
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    scope = {"__name__": "readme"}
    for block in blocks:
        block = block.replace("Qwen/Qwen3-4B", str(base)).replace("max_steps=500", "max_steps=1")
        exec(compile(block, "README.md", "exec"), scope)
