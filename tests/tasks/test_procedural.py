"""Tasks of reasoning-gym: held-out questions, its own scoring, options in the name."""

import sys

import pytest

from diffmas.tasks import TaskArguments, load_task, procedural


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ModuleNotFoundError, match=r"install diffmas\[procedural\]"):
        load_task(TaskArguments(task="rg:chain_sum"))


@pytest.mark.parametrize("name", ["chain_sum:max_terms=2,max_digits=2", "leg_counting", "basic_arithmetic"])
def test_items(name):
    pytest.importorskip("reasoning_gym")
    args = TaskArguments(task=f"rg:{name},size=5000", eval_size=40, train_size=300)
    first, again = load_task(args), load_task(args)
    assert first.name == name.partition(":")[0] and len(first.train) == 300 and len(first.eval) == 40
    assert first.eval == again.eval and [*first.train] == [*again.train]
    held_out = {item["question"] for item in first.eval}
    assert len(held_out) == 40 and held_out.isdisjoint(item["question"] for item in first.train)
    other = load_task(TaskArguments(task=f"rg:{name},size=5000", eval_size=40, task_seed=1))
    assert {item["question"] for item in other.eval} != held_out
    for item in first.eval[:20]:
        assert first.check(item["answer"], item)
        assert first.check(f"Well. <answer> {item['answer']} </answer>", item)
        assert first.check(f"So \\boxed{{{item['answer']}}}.", item)
        assert not any(first.check(text, item) for text in ("", "no", "<answer></answer>", item["answer"] + "1"))
    assert first.extract("<answer> A  B </answer>") == "a b" and first.extract(" ") is None


def test_scores_below_one_are_wrong():
    pytest.importorskip("reasoning_gym")
    task = load_task(TaskArguments(task="rg:chain_sum,size=500", eval_size=3))
    item = task.eval[0]
    assert not task.check(f"{item['answer']} or so", item)


def test_what_a_scorer_cannot_bear_is_wrong():
    def score(answer, entry):
        raise RuntimeError("no")

    assert not procedural.check(score, "x", {"answer": "1"})
    assert not procedural.check(lambda answer, entry: 1.0, "9**9**9", {"answer": "1"})
    assert procedural.check(lambda answer, entry: 1.0, "2**3", {"answer": "8**1"})


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("rg:no_such_set", "allowed after rg: .*chain_sum"),
        ("rg:chain_sum,max_terms", "allowed: name, or name:option=value"),
        ("rg:chain_sum,no_such_option=1", "refuses .*no_such_option"),
        ("rg:chain_sum,min_terms=9,max_terms=2", "refuses .*max_terms"),
        ("rg:chain_sum,size=1,seed=0,max_digits=1,max_terms=2", "no question to hold out"),
    ],
)
def test_bad_names(task, message):
    pytest.importorskip("reasoning_gym")
    with pytest.raises(ValueError, match=message):
        load_task(TaskArguments(task=task))
