"""Rows longer than a model was made for: told once with numbers, or refused where the code ends; and prompts cut."""

import json
import logging
import re

import pytest
import torch
from transformers import AutoConfig, Qwen3Config, Qwen3ForCausalLM

from diffmas import train
from diffmas.agents.positions import check_positions, position_limit, row_positions
from diffmas.agents.topology import TOPOLOGIES, load_topology
from diffmas.models.errors import UnsupportedModelError
from diffmas.system import MultiAgentSystem


def model(**changes):
    torch.manual_seed(0)
    sizes = dict(vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                 num_key_value_heads=1, head_dim=8)  # fmt: skip
    return Qwen3ForCausalLM(Qwen3Config(**sizes, **changes))


@pytest.fixture
def system():
    return MultiAgentSystem(model(max_position_embeddings=32), TOPOLOGIES["sequential"], latent_steps=3)


def told(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "diffmas.agents.positions"]


def test_positions_of_a_row(system):
    assert row_positions(system.trajectory, [5, 6, 7, 8], 4) == 5 + 6 + 7 + 8 + 3 * 3 + 4
    stitched = MultiAgentSystem(model(), TOPOLOGIES["stitch"], latent_steps=3)
    assert row_positions(stitched.trajectory, [5, 6, 7, 8], 4) == 5 + 6 + 7 + 8 + 3 * 3 + 4
    chain = MultiAgentSystem(model(), load_topology("sequential", "latent", 2), latent_steps=3)
    assert row_positions(chain.trajectory, [5, 6, 7, 8], 4) == 2 + 3 * 3 + 8 + 4
    relay = MultiAgentSystem(model(), TOPOLOGIES["relay"], latent_steps=3)
    assert row_positions(relay.trajectory, [50, 8], 4) == 53, "the sender's own trace is the longest"


def test_told_once_with_numbers(system, caplog):
    with caplog.at_level(logging.WARNING, logger="diffmas.agents.positions"):
        check_positions(system.agent_model.language_model, 32, "the longest row")
        assert told(caplog) == []
        check_positions(system.agent_model.language_model, 33, "the longest row")
        check_positions(system.agent_model.language_model, 99, "the longest row")
    (message,) = told(caplog)
    assert re.search("takes up to 33 positions .* made for 32 .*--latent_steps", message)


def test_scaled_positions_reach_further():
    scaled = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
    assert position_limit(model(max_position_embeddings=32, rope_parameters=scaled)) == 128
    assert position_limit(model(max_position_embeddings=512)) == 512


@pytest.mark.parametrize("kind", ["ends", "repeats"])
def test_a_table_that_ends_is_refused(system, monkeypatch, kind):
    table = torch.randn(32, 8)

    def rotary(x, position_ids):
        places = position_ids if kind == "ends" else position_ids.clamp(max=31)
        return table[places].cos(), table[places].sin()

    decoder = system.agent_model.language_model.get_decoder()
    monkeypatch.setattr(type(decoder.rotary_emb), "forward", lambda self, *args: rotary(*args))
    check_positions(system.agent_model.language_model, 32, "the longest row")
    with pytest.raises(UnsupportedModelError, match=r"takes 33 positions, .* allowed: up to 32"):
        check_positions(system.agent_model.language_model, 33, "the longest row")


@pytest.fixture
def short(base, tmp_path):
    """Flags of a two-step run on a model of 32 positions."""
    import shutil

    folder = shutil.copytree(base, tmp_path / "model")
    config = AutoConfig.from_pretrained(folder)
    config.max_position_embeddings = 32
    config.save_pretrained(folder)
    return [
        f"--model={folder}", "--topology=relay", "--max_steps=1", "--save_strategy=no", "--eval_size=4",
        "--per_device_train_batch_size=2", "--gradient_accumulation_steps=1", "--disable_tqdm=True",
        "--per_device_eval_batch_size=4", "--temperature=0", f"--output_dir={tmp_path / 'run'}",
    ]  # fmt: skip


@pytest.fixture
def items(tmp_path):
    """A file with one item whose question is long."""
    path = tmp_path / "items.jsonl"
    rows = [{"question": "7 " * (400 if i == 2 else 1), "answer": "7"} for i in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [f"--task={path}", "--topology=single", "--latent_steps=0", "--max_new_tokens=2"]


def test_a_training_says_so_before_its_first_step(short, items, caplog):
    with caplog.at_level(logging.WARNING, logger="diffmas.agents.positions"):
        assert train.main([*short, *items, "--latent_steps=30", "--disable_final_eval"]) == 0
    assert len(told(caplog)) == 1 and "made for 32" in told(caplog)[0]


def test_an_evaluation_says_so(short, items, caplog):
    with caplog.at_level(logging.WARNING, logger="diffmas.agents.positions"):
        assert train.main([*short, *items, "--max_new_tokens=40"]) == 0
    assert len(told(caplog)) == 1


def test_prompts_are_cut_and_it_is_said(short, items, tmp_path, capsys):
    flags = [word for word in short if "topology" not in word]
    assert train.main([*flags, *items, "--max_prompt_tokens=300"]) == 0
    cut = json.loads((tmp_path / "run" / "summary.json").read_text())["cut"]
    assert cut["max_prompt_tokens"] == 300 and cut["items"] == 1 and cut["tokens"] > 0
    assert "300" in capsys.readouterr().out


def test_a_role_prompt_is_not_cut(short, items, capsys):
    flags = [word for word in short if "topology" not in word]
    assert train.main([*flags, *items, "--max_prompt_tokens=3"]) == 2
    assert "max_prompt_tokens is 3, and" in capsys.readouterr().err


@pytest.mark.parametrize("count", [0, -1])
def test_a_bad_limit_is_named(short, items, capsys, count):
    assert train.main([*short, f"--max_prompt_tokens={count}"]) == 2
    assert f"max_prompt_tokens is {count}; allowed: integers ≥ 1" in capsys.readouterr().err
