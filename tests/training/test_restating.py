"""`--restate_steps`: senders learn to say in text what they are told, before the method's own loss."""

import json
import shutil

import pytest
import torch
import yaml
from compare import assert_same, error, gradients
from peft import LoraConfig
from safetensors.torch import load_file
from tiny_models import arguments, causal_lm, clone, ragged

from diffmas import train
from diffmas.agents.scoring import restating_agents
from diffmas.agents.topology import Agent, Topology
from diffmas.embedded.tokenizer import build_tokenizer
from diffmas.runs.files import ADAPTER_FILE
from diffmas.system import MultiAgentSystem
from diffmas.training.restating import SAID, RestatingCollator

LORA = dict(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
QUICK = dict(restate_steps=2, max_steps=4, eval_size=3, max_new_tokens=1, logging_steps=3)
TEAM = Topology(
    "team",
    (
        Agent("one", prompt={"user": "{fact} {more} ?"}),
        Agent("two", prompt={"user": "{more} ?"}),
        Agent("still", prompt={"user": "{fact}"}, adapter="none"),
        Agent("last", ("one", "two", "still"), prompt={"user": "{question}"}),
    ),
    "latent",
    adapters="per_role",
)


@pytest.mark.parametrize("checkpointing", ["none", "all"])
@pytest.mark.parametrize("rows", [1, 7])
def test_loss_and_gradients_are_those_of_each_row_alone(rows, checkpointing):
    torch.manual_seed(rows)
    system = MultiAgentSystem(
        causal_lm("qwen3"), TEAM, peft_config=LoraConfig(**LORA), latent_steps=2, checkpointing=checkpointing
    ).train()
    for name, parameter in system.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    assert [agent.name for agent in restating_agents(TEAM)] == ["one", "two"]
    prompts, answers = ragged([agent.name for agent in TEAM.agents], rows)
    said = [ragged(["x"], rows, seed=seed)[1] for seed in (1, 2)]
    batch = dict(
        zip(("prompt_ids", "prompt_lengths", "answer_ids", "answer_lengths"), arguments(prompts, answers), strict=True)
    )
    batch |= dict(said_ids=[torch.cat(own) for own in said], said_lengths=[[*map(len, own)] for own in said])
    output = system(**batch)
    output.loss.backward()
    # A model that PEFT itself switches, a row after the other, with logits of everything.
    twin, total, count = clone(system.agent_model.model), 0.0, 0
    twin.zero_grad()
    for adapter, texts in zip(("one", "two"), said, strict=True):
        twin.set_adapter(adapter)
        for prompt, text in zip(prompts[adapter], texts, strict=True):
            logits = twin(input_ids=torch.cat([prompt, text])[None]).logits[0, len(prompt) - 1 : -1]
            loss = torch.nn.functional.cross_entropy(logits, text, reduction="sum")
            loss.backward()
            total, count = total + loss.detach(), count + len(text)
    assert error(output.loss.detach(), total / count) <= 1e-10
    wanted = {name: gradient / count for name, gradient in gradients(twin).items()}
    assert {name.split(".")[-2] for name in wanted} == {"one", "two"}
    assert_same(gradients(system.agent_model.model), wanted, 1e-10)


def test_what_is_said_again():
    tokenizer = build_tokenizer()
    system = MultiAgentSystem(causal_lm("qwen3"), TEAM, tokenizer=tokenizer, peft_config=LoraConfig(**LORA))
    items = [{"fact": "a b", "more": "c", "question": "d", "answer": "e"}] * 2
    batch = RestatingCollator(system.collator, system.collator)(items)
    pairs = zip(*(batch[name] for name in SAID), strict=True)
    decoded = [tokenizer.decode(ids[: lengths[0]]) for ids, lengths in pairs]
    assert decoded == [f"a b\nc{tokenizer.eos_token}", f"c{tokenizer.eos_token}"]


def entries(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("adapters", ["shared", "per_role"])
def test_a_run_restates_first(flags, tmp_path, adapters):
    run = tmp_path / "run"
    assert train.main(flags(adapters=adapters, **QUICK)) == 0
    said = {entry["step"]: "restating_loss" if "restating_loss" in entry else "loss" for entry in entries(run)[:-1]}
    assert said == {2: "restating_loss", 3: "loss"}
    # One that was stopped while it restated, or behind it, ends at the same weights.
    for step in (1, 2, 3):
        again = tmp_path / f"again-{step}"
        given = dict(adapters=adapters, **QUICK, save_steps=1, save_total_limit=9, disable_final_eval=True)
        if step == 1:
            assert train.main(flags(**given, output_dir=tmp_path / "steps")) == 0
        shutil.copytree(tmp_path / "steps", again)
        (again / ADAPTER_FILE).unlink()
        for later in range(step + 1, 5):
            shutil.rmtree(again / f"checkpoint-{later}")
        assert train.main(flags(**given, output_dir=None, resume_from_checkpoint=again)) == 0
        assert same(again, run)


def same(one, other):
    found = [load_file(folder / ADAPTER_FILE) for folder in (one, other)]
    return found[0].keys() == found[1].keys() and all(torch.equal(found[0][n], t) for n, t in found[1].items())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(restate_steps=-1), "restate_steps is -1; allowed: integers ≥ 0"),
        (dict(restate_steps=5), "restate_steps is 5, and the training has 4 steps; allowed: fewer"),
        (dict(topology="single"), "restate_steps is 2, and topology 'single' has no agent before the last"),
    ],
)
def test_bad_input(flags, tmp_path, capsys, changes, said):
    assert train.main(flags(**QUICK | changes)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_senders_that_do_not_train(flags, tmp_path, capsys):
    agents = [{"name": "sender", "adapter": "none"}, {"name": "solver", "receives": ["sender"]}]
    (tmp_path / "team.yaml").write_text(yaml.safe_dump({"name": "team", "agents": agents}))
    assert train.main(flags(topology=tmp_path / "team.yaml", **QUICK)) == 2
    assert "no agent before the last whose adapter trains; allowed: 0" in capsys.readouterr().err
