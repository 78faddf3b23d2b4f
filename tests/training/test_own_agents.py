"""Agents of one's own: what a run will need of prompts, topology and items is asked before it trains."""

import json

import pytest

from diffmas import eval as evaluate
from diffmas import train
from diffmas.evaluation.evaluator import VARIANTS
from diffmas.evaluation.records import read_records
from diffmas.system import MultiAgentSystem

TWO = "{name: two, agents: [{name: a}, {name: b, receives: [a]}]}"
PROMPTS = "roles: {a: {user: 'Hint {hint}'}, b: {user: 'Task {question}'}}"
PRIVATE = [{"question": f"{i} + {i}?", "hint": f"it is {2 * i}", "answer": str(2 * i)} for i in range(12)]


@pytest.fixture
def own(flags, tmp_path):
    """`own(topology, prompts, items, **changes)`: flags of a short training with them."""

    def build(topology=TWO, prompts=PROMPTS, items=PRIVATE, **changes):
        for name, text in (("two.yaml", topology), ("two_prompts.yaml", prompts)):
            (tmp_path / name).write_text(text)
        (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
        values = dict(
            topology=tmp_path / "two.yaml", prompts=tmp_path / "two_prompts.yaml", task=tmp_path / "items.jsonl",
            max_steps=1, eval_size=3,
        )  # fmt: skip
        return flags(**(values | changes))

    return build


@pytest.fixture
def untrained(monkeypatch):
    """Nothing may be trained."""
    monkeypatch.setattr(MultiAgentSystem, "forward", lambda *a, **k: pytest.fail("something was trained"))


def evaluated(folder):
    return {json.loads(line)["variant"] for line in (folder / "eval.jsonl").read_text().splitlines()}


def test_two_agents_with_private_fields(own, tmp_path, capsys):
    assert train.main(own()) == 0
    out, run = capsys.readouterr().out, tmp_path / "run"
    reason, own = (
        f"prompts {path} has no prompt for the role 'single'"
        for path in (tmp_path / "two_prompts.yaml", run / "prompts.yaml")
    )
    assert f"not evaluated: one agent without the adapter ({reason})" in out
    assert evaluated(run) == VARIANTS.keys() - {"single"}
    summary = json.loads((run / "summary.json").read_text())
    assert summary["left_out"] == {"single": reason} and "accuracy_single" not in summary
    assert "Not evaluated: one agent without the adapter" in (run / "report.html").read_text()
    assert all("it is" not in r.prompt for r in read_records(run / "eval.jsonl"))
    assert evaluate.main([f"--run={run}", "--disable_tqdm=true"]) == 0
    assert "not evaluated: one agent without" in capsys.readouterr().out
    assert json.loads((run / "eval" / "summary.json").read_text())["left_out"] == {"single": own}
    assert evaluate.main([f"--run={run}", "--variants=matched,single"]) == 2
    assert "variants has 'single': prompts" in capsys.readouterr().err


def test_methods_that_do_not_apply(own, tmp_path, capsys, untrained):
    command = [*own(output_dir=None), f"--run={tmp_path / 'out'}"]
    assert evaluate.main([*command, "--methods=diffmas,single+sft"]) == 2
    error = capsys.readouterr().err
    assert "method single+sft does not apply to" in error and "no prompt for the role 'single'" in error
    assert not (tmp_path / "out").exists()


def test_all_methods_that_apply(own, tmp_path, capsys):
    command = [*own(output_dir=None), f"--run={tmp_path / 'out'}", "--disable_tqdm=true"]
    assert evaluate.main([*command, "--methods=all"]) == 0
    out = capsys.readouterr().out
    assert "method single is left out: prompts" in out and "method single+sft is left out: prompts" in out
    methods = {r.method for r in read_records(tmp_path / "out" / "items.jsonl")}
    assert methods == {"text", "text+sft", "latent", "stitch", "stitch+train", "diffmas", "diffmas+detach"}


SHARED = {"question": "q", "answer": "1"}
BAD = [
    # In one item of many, to train on or to evaluate on.
    (dict(items=[*PRIVATE[:4], SHARED, *PRIVATE]), "training item 5: prompts", "user of role a names the field 'hint'"),
    (dict(items=[*PRIVATE, SHARED]), "evaluation item 3: prompts", "user of role a names the field 'hint'"),
    (dict(items=[PRIVATE[0] | {"hint": None}, *PRIVATE]), "training item 1", "names the field 'hint', which is null"),
    (dict(prompts="roles: {a: {user: x}}"), "role is 'b', which has none; allowed: a", ""),
    (dict(prompts=PROMPTS.replace("{hint}", "{hint.text}")), "training", ""),
    (dict(topology=TWO.replace("b,", "b, role: judge,")), "role is 'judge', which has none; allowed: a, b", ""),
    # The only agent that it is compared with has a prompt, and an item cannot fill it.
    (dict(prompts=PROMPTS[:-1] + ", single: {user: '{topic}'}}"), "user of role single names the field 'topic'", ""),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message", "also"), BAD)
def test_what_is_missing_is_named_before_training(own, tmp_path, capsys, untrained, changes, message, also):
    if "{hint.text}" in changes.get("prompts", ""):
        message = "user of role a cannot be filled ('str' object has no attribute 'text')"
    assert train.main(own(**changes)) == 2
    error = capsys.readouterr().err
    assert message in error and also in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


FINE = {
    "unused roles": dict(prompts=PROMPTS[:-1] + ", other: {user: '{nothing}'}}"),
    "an agent that sees nothing": dict(prompts=PROMPTS.replace("Hint {hint}", "")),
    "an agent that is told nothing of the item": dict(prompts=PROMPTS.replace("Hint {hint}", "Think.")),
    "one role twice": dict(
        topology="{name: two, agents: [{name: a}, {name: c, role: a}, {name: last, role: b, receives: [a, c]}]}"
    ),
    "odd field names": dict(
        prompts=PROMPTS.replace("{hint}", "{the hint-2} {steps[0]} {größe}"),
        items=[i | {"the hint-2": "x", "steps": ["y", "z"], "größe": 3} for i in PRIVATE],
    ),
    "a default role": dict(prompts="roles: {default: {user: '{question} {hint}'}}"),
}


@pytest.mark.parametrize("changes", FINE.values(), ids=FINE)
def test_what_is_fine(own, tmp_path, changes):
    assert train.main(own(**changes)) == 0
    has_default = "default" in changes.get("prompts", "")
    assert evaluated(tmp_path / "run") == VARIANTS.keys() - (set() if has_default else {"single"})


def test_one_item_to_evaluate_on(own, tmp_path, capsys):
    assert train.main(own(eval_size=1)) == 0
    reason = "there is one item to evaluate on, and no other whose trace it could get"
    assert f"not evaluated: trained, another row's trace ({reason})" in capsys.readouterr().out
    assert evaluated(tmp_path / "run") == VARIANTS.keys() - {"single", "mismatched"}
    command = [*own(eval_size=1, output_dir=None), f"--run={tmp_path / 'out'}", "--methods=latent"]
    assert evaluate.main(command) == 0
    assert f"no method is answered with another row's trace ({reason})" in capsys.readouterr().out
    assert {r.control for r in read_records(tmp_path / "out" / "items.jsonl")} == {"matched", "zero", "noise"}
    assert evaluate.main([f"--run={tmp_path / 'run'}", "--variants=mismatched"]) == 2
    assert "variants has 'mismatched': there is one item" in capsys.readouterr().err


def test_an_agent_of_one_s_own_that_works_alone(own, tmp_path, capsys):
    """It receives no trace, so that no control of it says anything; untrained, it is compared with itself."""
    given = dict(topology="{name: one, agents: [{name: b}]}")
    assert train.main(own(**given)) == 0
    assert evaluated(tmp_path / "run") == {"matched", "single"}
    assert all("Task " in r.prompt for r in read_records(tmp_path / "run" / "eval.jsonl"))
    capsys.readouterr()
    command = [*own(**given, output_dir=None), f"--run={tmp_path / 'out'}", "--disable_tqdm=true"]
    assert evaluate.main([*command, "--methods=all"]) == 0
    out = capsys.readouterr().out
    assert "method diffmas is left out: topology one has one agent, whom nobody hands anything" in out
    assert {r.method for r in read_records(tmp_path / "out" / "items.jsonl")} == {"single", "single+sft"}
    assert evaluate.main([*command, "--methods=text"]) == 2
    assert "method text does not apply to" in capsys.readouterr().err
