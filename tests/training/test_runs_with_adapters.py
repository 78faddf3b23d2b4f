"""Runs whose agents have adapters of their own: trained, kept as stock PEFT keeps them, gone on with, evaluated."""

import json
import shutil

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file

from diffmas import eval as evaluate
from diffmas import train
from diffmas.loading import load_run
from diffmas.models.pretrained import load_base
from diffmas.runs.files import ADAPTER_FILE
from diffmas.system import MultiAgentSystem

QUICK = dict(eval_size=3, max_new_tokens=1, max_steps=4)


def kept(run, *names):
    return {name: load_file(run / name / ADAPTER_FILE if name else run / ADAPTER_FILE) for name in names}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_one_adapter_a_role(flags, tmp_path, base):
    run = tmp_path / "run"
    assert train.main(flags(adapters="per_role", **QUICK)) == 0
    whole = kept(run, "", "sender")
    assert not same(whole[""], whole["sender"])
    assert all(tensor.abs().sum() > 0 for n, tensor in whole["sender"].items() if "lora_B" in n)
    # Each is a folder that stock PEFT loads.
    model = PeftModel.from_pretrained(load_base(base)[0], str(run / "sender"))
    assert same(
        {n.replace(".default", ""): p.detach() for n, p in model.named_parameters() if "lora_" in n}, whole["sender"]
    )
    # A run that was stopped goes on to the same weights.
    again = tmp_path / "again"
    given = dict(adapters="per_role", output_dir=again, **QUICK)
    assert train.main(flags(**given | {"max_steps": 2, "lr_scheduler_type": "constant"})) == 0
    shutil.rmtree(again)
    shutil.copytree(run, again, ignore=lambda folder, names: [n for n in names if n in (ADAPTER_FILE, "checkpoint-4")])
    shutil.copytree(run / "checkpoint-2", again / "checkpoint-2", dirs_exist_ok=True)
    assert train.main(flags(**given | {"output_dir": None, "resume_from_checkpoint": again})) == 0
    assert all(same(kept(again, "", "sender")[name], tensors) for name, tensors in whole.items())
    # Loaded, it answers as it did.
    assert evaluate.main([f"--run={run}", "--variants=matched", "--disable_tqdm=true"]) == 0
    found = [json.loads(line) for line in (run / "eval" / "eval.jsonl").read_text().splitlines()]
    records = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    assert [r["logprob"] for r in found] == [r["logprob"] for r in records if r["variant"] == "matched"]
    copy = tmp_path / "copy"
    MultiAgentSystem.from_pretrained(run).save_pretrained(copy)
    assert all(same(kept(copy, "", "sender")[name], tensors) for name, tensors in whole.items())


def test_an_adapter_that_starts_elsewhere_and_one_that_is_frozen(flags, tmp_path):
    first = tmp_path / "first"
    assert train.main(flags(output_dir=first, **QUICK, disable_final_eval=True)) == 0
    team = {
        "name": "team",
        "handover": "latent",
        "adapters": {"reading": {"path": str(first), "train": False}},
        "agents": [{"name": "sender", "adapter": "reading"}, {"name": "solver", "receives": ["sender"]}],
    }
    (tmp_path / "team.yaml").write_text(yaml.safe_dump(team))
    assert train.main(flags(topology=tmp_path / "team.yaml", **QUICK)) == 0
    found = kept(tmp_path / "run", "", "reading")
    (begun,) = kept(first, "").values()
    assert same(found["reading"], begun) and not same(found[""], begun)
    system = load_run(tmp_path / "run").system
    assert {n.split(".")[-2] for n, p in system.named_parameters() if p.requires_grad} == {"default"}


@pytest.mark.parametrize("lost", ["sender/adapter_model.safetensors", "sender/adapter_config.json"])
def test_a_checkpoint_without_one_of_them(flags, tmp_path, lost, capsys):
    run = tmp_path / "run"
    assert train.main(flags(adapters="per_role", **QUICK, disable_final_eval=True)) == 0
    (run / "checkpoint-4" / lost).unlink()
    given = dict(max_steps=6, output_dir=None, resume_from_checkpoint=run / "checkpoint-4")
    given = flags(adapters="per_role", **QUICK | given)
    assert train.main(given) == 2 and f"{lost} is missing" in capsys.readouterr().err


@pytest.mark.parametrize("before", [False, True], ids=["", "from before there were others"])
def test_a_run_goes_on_with_the_adapters_it_has(flags, tmp_path, capsys, before):
    run = tmp_path / "run"
    assert train.main(flags(**QUICK, disable_final_eval=True)) == 0
    description = json.loads((run / "system.json").read_text())
    if before:
        del description["topology"]["adapters"], description["topology"]["adapter_options"]
        del description["system"]["adapters"]
        (run / "system.json").write_text(json.dumps(description))
    given = dict(adapters="per_role", max_steps=6, output_dir=None, resume_from_checkpoint=run)
    assert train.main(flags(**QUICK | given)) == 2
    assert "adapters is 'per_role'" in capsys.readouterr().err
    # Nothing was touched, and what is there goes on.
    assert (run / ADAPTER_FILE).is_file() and json.loads((run / "system.json").read_text()) == description
    assert train.main(flags(**QUICK | given | {"adapters": None}, disable_final_eval=True)) == 0


def test_finished_adapters_are_set_aside_together(flags, tmp_path):
    run = tmp_path / "run"
    assert train.main(flags(adapters="per_role", **QUICK, disable_final_eval=True)) == 0
    finished = kept(run, "", "sender")
    given = dict(adapters="per_role", max_steps=6, output_dir=None, resume_from_checkpoint=run)
    assert train.main(flags(**QUICK | given, disable_final_eval=True)) == 0
    for name, tensors in finished.items():
        old = (run / name / ADAPTER_FILE).with_suffix(".old.safetensors")
        assert same(load_file(old), tensors) and not same(kept(run, name)[name], tensors)


def test_bad_settings(flags, tmp_path, capsys):
    assert train.main(flags(adapters="each", **QUICK)) == 2
    assert "adapters is 'each'; allowed: shared, per_role" in capsys.readouterr().err
    team = {
        "adapters": {"own": {"path": "nowhere"}},
        "agents": [{"name": "sender", "adapter": "own"}, {"name": "solver", "receives": ["sender"]}],
    }
    (tmp_path / "team.yaml").write_text(yaml.safe_dump(team))
    assert train.main(flags(topology=tmp_path / "team.yaml", **QUICK)) == 2
    assert "adapter own begins at 'nowhere', which has no adapter_model.safetensors" in capsys.readouterr().err
    team["adapters"] = {"default": {"train": False}, "own": {"train": False}}
    (tmp_path / "team.yaml").write_text(yaml.safe_dump(team))
    assert train.main(flags(topology=tmp_path / "team.yaml", **QUICK)) == 2
    assert "no weight trains" in capsys.readouterr().err


def test_methods_on_a_run_with_adapters(flags, team_flags, tmp_path):
    given = team_flags(adapters="per_role", max_steps=2, eval_size=3)
    assert evaluate.main([*given, f"--run={tmp_path / 'm'}", "--methods=single+sft,diffmas,stitch+train"]) == 0
    trained = {path.parent.parent.name: path.parent for path in (tmp_path / "m").rglob("seed-0/adapter_model*")}
    assert {name for name, run in trained.items() if (run / "sender").is_dir()} == {"diffmas", "stitch+train"}
