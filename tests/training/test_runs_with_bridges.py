"""Runs whose agents hand over hidden states, on one model and on several: trained, kept, gone on with, evaluated."""

import json
import shutil

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from diffmas import ablate, show, train
from diffmas import eval as evaluate
from diffmas.agents.costs import BACKWARD
from diffmas.embedded.tokenizer import LLAMA, build_tokenizer
from diffmas.loading import load_run
from diffmas.models.pretrained import load_base
from diffmas.runs.files import ADAPTER_FILE, ALIGNMENT_FILE, BRIDGES_FILE
from diffmas.system import MultiAgentSystem
from diffmas.training import batching, profiling
from diffmas.training.checkpoints import damage

QUICK = dict(eval_size=3, max_new_tokens=1, max_steps=4)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Folder of another tiny base: another family, other sizes, another tokenizer."""
    folder, tokenizer = tmp_path_factory.mktemp("other"), build_tokenizer(LLAMA)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=3,
        num_key_value_heads=1, tie_word_embeddings=False, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def pair(other, tmp_path):
    """A topology file: a sender on the other base, a solver on the one that is given."""

    def write(**changes):
        team = {
            "name": "pair",
            "models": {"small": {"model_name_or_path": other}},
            "agents": [{"name": "sender", "model": "small"}, {"name": "solver", "receives": ["sender"]}],
        }
        (tmp_path / "pair.yaml").write_text(yaml.safe_dump(team | changes))
        return tmp_path / "pair.yaml"

    return write


def weights(run):
    return {
        path.relative_to(run): load_file(path)
        for path in sorted(run.rglob("*.safetensors"))
        if "checkpoint" not in str(path)
    }


def same(left, right):
    assert left.keys() == right.keys()
    return all(torch.equal(t, right[file][n]) for file, tensors in left.items() for n, t in tensors.items())


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("several", [False, True], ids=["one model", "two models"])
def test_a_run_is_kept_gone_on_with_and_evaluated(flags, pair, tmp_path, base, several, other):
    run, again = tmp_path / "run", tmp_path / "again"
    team = dict(topology=pair()) if several else dict(handover="bridge")
    given = QUICK | team | dict(alignment="learned", adapters="per_role", lr_scheduler_type="constant")
    assert train.main(flags(**given)) == 0
    whole = weights(run)
    edge = whole[next(f for f in whole if f.name == BRIDGES_FILE)]
    assert edge.keys() == {"sender->solver.linear.weight", "sender->solver.linear.bias"}
    assert edge["sender->solver.linear.weight"].shape == ((16, 24) if several else (16, 16))
    assert edge["sender->solver.linear.bias"].abs().sum() > 0
    place = run / "small" / "sender" if several else run / "sender"
    trained = load_file(place / ADAPTER_FILE)
    assert all(t.abs().sum() > 0 for n, t in trained.items() if "lora_B" in n)
    assert (run / "small" / ALIGNMENT_FILE).is_file() == several
    # Each is a folder that stock PEFT loads.
    model = PeftModel.from_pretrained(load_base(other if several else base)[0], str(place))
    found = {n.replace(".default", ""): p.detach() for n, p in model.named_parameters() if "lora_" in n}
    assert found.keys() == trained.keys() and all(torch.equal(t, trained[n]) for n, t in found.items())
    # A run that was stopped goes on to the same weights.
    shutil.copytree(run, again, ignore=lambda _, names: [n for n in names if n in (ADAPTER_FILE, "checkpoint-4")])
    shutil.copytree(run / "checkpoint-2", again / "checkpoint-2", dirs_exist_ok=True)
    assert train.main(flags(**given | {"output_dir": None, "resume_from_checkpoint": again})) == 0
    assert same(weights(again), whole)
    # Loaded, it answers as it did.
    assert evaluate.main([f"--run={run}", "--variants=matched,zero,single", "--disable_tqdm=true"]) == 0
    before = {(r["variant"], r["index"]): r["logprob"] for r in records(run / "eval.jsonl")}
    after = {(r["variant"], r["index"]): r["logprob"] for r in records(run / "eval" / "eval.jsonl")}
    assert after.keys() < before.keys() and all(before[key] == value for key, value in after.items())
    copy = tmp_path / "copy"
    MultiAgentSystem.from_pretrained(run).save_pretrained(copy)
    assert same(weights(copy), whole)


def test_a_checkpoint_without_one_of_them(flags, pair, tmp_path):
    run, team = tmp_path / "run", dict(topology=pair(), alignment="learned", disable_final_eval=True)
    assert train.main(flags(**QUICK | team | {"max_steps": 2})) == 0
    assert damage(run / "checkpoint-2") is None
    for lost in (BRIDGES_FILE, f"small/{ADAPTER_FILE}", f"small/{ALIGNMENT_FILE}"):
        path = run / "checkpoint-2" / lost
        kept = path.read_bytes()
        path.write_bytes(kept[:20])
        assert damage(run / "checkpoint-2") == f"{lost} is damaged"
        path.unlink()
        assert damage(run / "checkpoint-2") == f"{lost} is missing"
        path.write_bytes(kept)


def test_every_model_reads_with_its_own_tokenizer(flags, pair, capsys):
    assert show.main([f for f in flags(topology=pair()) if "use_cpu" not in f]) == 0
    said = capsys.readouterr().out
    assert "⟦[question]⟧|F|a|c|t|s" in said and "⟦<|user|>⟧|Recall" in said
    assert "behind hidden states of sender: the prompt's last, and those of 2 latent steps each" in said


@pytest.mark.parametrize(
    ("team", "given", "said"),
    [
        ({"agents": [{"name": "a", "model": "huge"}]}, {}, "model of agent a is 'huge'; allowed: small"),
        (
            {"models": {"small": {"path": "x"}}},
            {},
            r"model small has unknown keys ['path']; allowed: model_name_or_path",
        ),
        ({"models": {"small": {"model_name_or_path": "no/such/place"}}}, {}, "model_name_or_path is 'no/such/place'"),
        ({"models": {"small": {}, "more": {"dtype": "float32"}}}, {}, "models has ['more'], which no agent runs on"),
        ({"handover": "latent"}, {}, "handover is 'latent' from agent sender to agent solver"),
        ({}, {"handover": "full"}, "3 attention layers of 1 × 8 there, 2 attention layers of 1 × 8 here"),
        ({}, {"cuda_graphs": "auto"}, "cuda_graphs is 'auto', and agents hand over hidden states"),
        ({}, {"bridge": "deep"}, "bridge is 'deep'; allowed: linear, mlp"),
    ],
)
def test_what_is_refused(flags, pair, capsys, team, given, said):
    assert train.main(flags(topology=pair(**team), **QUICK, **given)) == 2
    assert said in capsys.readouterr().err


def test_memory_and_time_of_several_models(flags, pair, tmp_path, monkeypatch):
    """What the batch is fitted to, and what a step is measured against, is that of both."""
    for module in (batching, profiling):
        # Measuring what the machine can takes longer than all else.
        monkeypatch.setattr(module, "measure_ceilings", lambda *args: (1e11, 1e10))
    given = QUICK | dict(
        auto_batch=True, checkpointing="auto", profile=True, memory_limit_gb=4, max_steps=3, train_size=64
    )
    assert train.main(flags(topology=pair(), bridge_states="full", **given | dict(disable_final_eval=True))) == 0
    run = tmp_path / "run"
    fitted, profile = (json.loads((run / name).read_text()) for name in ("summary.json", "profile.json"))
    assert fitted["fit"]["rows"] == 8 and 0 < fitted["fit"]["peak"] < fitted["fit"]["budget"] < 4e9
    assert fitted["system"]["bridge_states"] == fitted["topology"]["bridge_states"] == "full"
    parts = profile["phases"]
    assert all(parts[name + back]["seconds"] > 0 for name in ("prefill", "latent", "answer") for back in ("", BACKWARD))
    assert train.main(flags(topology=pair(), output_dir=tmp_path / "b", **given | dict(memory_limit_gb=1e-6))) == 2


def test_one_base_under_two_names_is_loaded_once(flags, pair, base, other, tmp_path, capsys):
    agents = [{"name": "sender", "model": "small"}, {"name": "solver", "model": "same", "receives": ["sender"]}]
    models = {name: {"model_name_or_path": other} for name in ("small", "same")}
    given = QUICK | dict(disable_final_eval=True, max_steps=1)
    assert train.main(flags(topology=pair(models=models, agents=agents), **given | dict(model=None))) == 0
    system = load_run(tmp_path / "run").system
    assert len(system.models) == 1 and not system.topology.bridge_edges
    assert train.main(flags(topology=pair(models=models, agents=agents), output_dir=tmp_path / "b", **given)) == 2
    assert "every agent names a model of topology 'pair'; allowed: none" in capsys.readouterr().err
    for name in (other, f"{other}/"):
        assert train.main(flags(topology=pair(), model=name, output_dir=tmp_path / "c", **given)) == 2
        assert "models default and small are one" in capsys.readouterr().err


def test_methods_that_apply_to_several_models(flags, pair, tmp_path, capsys):
    given = [f for f in flags(topology=pair(), output_dir=None, **QUICK | dict(max_steps=1)) if "disable_tqdm" not in f]
    given += [f"--run={tmp_path / 'm'}", "--controls=matched,mismatched"]
    for name in ("stitch", "text"):
        assert evaluate.main([*given, f"--methods=single,{name}"]) == 2
        said = f"method {name} does not apply to relay: agents run on several models, default, small"
        assert said in capsys.readouterr().err
    assert evaluate.main([*given, "--methods=single,latent,diffmas"]) == 0
    assert {(r["method"], r["control"]) for r in records(tmp_path / "m" / "items.jsonl")} == {
        ("single", "matched"), *((m, c) for m in ("latent", "diffmas") for c in ("matched", "mismatched"))
    }  # fmt: skip


def test_an_ablation_of_the_hand_over(flags, tmp_path):
    given = [f for f in flags(output_dir=None, **QUICK | dict(max_steps=1)) if "disable_tqdm" not in f]
    assert ablate.main([*given, f"--run={tmp_path / 'a'}", "--handover=latent,bridge", "--disable_tqdm"]) == 0
    kept = {p.parent.parent.name: p for p in (tmp_path / "a").rglob(f"seed-0/{ADAPTER_FILE}")}
    assert len(kept) == 2 and sum((p.parent / BRIDGES_FILE).is_file() for p in kept.values()) == 1
