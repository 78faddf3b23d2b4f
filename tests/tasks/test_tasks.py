"""Tasks: loading, held-out items, extraction and checking, prompts, and what each refuses."""

import json
import re

import pytest

from diffmas.agents.collator import Collator, pack
from diffmas.agents.topology import TOPOLOGIES
from diffmas.embedded.tokenizer import build_tokenizer
from diffmas.prompts import Prompts
from diffmas.tasks import TaskArguments, load_task


def write(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return str(path)


def test_gsm8k_from_local_files(tmp_path):
    write(tmp_path / "train.jsonl", [{"question": "q", "answer": "work\n#### 1,000"}] * 3)
    write(tmp_path / "test.jsonl", [{"question": "q", "answer": "#### -7"}] * 2)
    task = load_task(TaskArguments(task="gsm8k", data_dir=str(tmp_path), train_size=2))
    assert [len(task.train), len(task.eval)] == [2, 2]
    assert [task.train[0]["gold"], task.eval[0]["gold"]] == ["1000", "-7"]
    assert all(task.check(item["answer"], item) for item in [*task.train, *task.eval])


def test_an_evaluation_file_is_no_hub_task_s(tmp_path):
    path = write(tmp_path / "held_out.jsonl", [{"question": "q", "answer": "1"}])
    with pytest.raises(ValueError, match="eval_file is .*held_out.jsonl' with task 'relay'; allowed"):
        load_task(TaskArguments(eval_file=path))


def test_jsonl_holds_out_its_last_items(tmp_path):
    path = write(tmp_path / "sums.jsonl", [{"ask": f"{i}+1", "out": i + 1} for i in range(20)])
    task = load_task(TaskArguments(task=path, fields="ask,out", eval_size=5))
    assert [item["question"] for item in task.eval] == [f"{i}+1" for i in range(15, 20)]
    assert len(task.train) == 15 and task.name == "sums"


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        ([], {}, "is empty"),
        ([{"question": "q"}], {}, "gold answer is missing"),
        ([{"answer": "1"}], {}, "question is missing"),
        ([{"question": "q", "answer": "1"}], {}, "eval_size is 1 of 1"),
        ([{"question": "q", "answer": "1"}] * 9, {"fields": "question"}, "fields is 'question'"),
        ([{"question": "q", "answer": "1"}] * 9, {"eval_size": 0}, "eval_size is 0"),
        ([["q", "a"]], {}, "line 1 is list"),
        ([{"question": "q", "answer": "1"}] * 9, {"eval_file": "nowhere.jsonl"}, "eval_file: no such file"),
        ([{"question": "q", "answer": "1"}] * 9, {"prompts": "nowhere.yaml"}, "prompts is 'nowhere.yaml'"),
    ],
)
def test_bad_jsonl(tmp_path, lines, options, message):
    path = write(tmp_path / "data.jsonl", lines)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_task(TaskArguments(task=path, **options))


def test_bad_files(tmp_path):
    (tmp_path / "data.jsonl").write_text("{not json\n")
    for task, message in (
        (str(tmp_path / "data.jsonl"), "line 1 is not JSON"),
        (str(tmp_path / "missing.jsonl"), "no such file"),
        ("checkers", "task is 'checkers'"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            load_task(TaskArguments(task=task))
    for split in ("train", "test"):
        write(tmp_path / f"{split}.jsonl", [{"question": "q", "answer": "no mark"}])
    with pytest.raises(ValueError, match="task gsm8k, test item 1: the gold answer is missing"):
        load_task(TaskArguments(task="gsm8k", data_dir=str(tmp_path)))


def test_relay_is_deterministic_and_held_out():
    first, again = (load_task(TaskArguments(train_size=300, eval_size=300)) for _ in range(2))
    assert [first.train[i] for i in range(300)] == [again.train[i] for i in range(300)]
    evidence = {first.train[i]["evidence"] for i in range(300)}
    assert evidence.isdisjoint(first.eval[i]["evidence"] for i in range(300))
    for i in range(20):
        item = first.eval[i]
        assert first.check(item["answer"], item) and not first.check("", item)
        slot = item["question"].split()[-1].strip("?.")
        assert f"{slot}{item['answer']}" in item["evidence"].split()


def test_prompts_name_what_is_missing():
    prompts = Prompts({"solver": {"user": "{question}"}})
    with pytest.raises(ValueError, match="role is 'critic'"):
        prompts.messages("critic", {"question": "q"})
    with pytest.raises(ValueError, match="prompts: user of role solver names the field 'question'; allowed: text"):
        prompts.messages("solver", {"text": "q"})


@pytest.mark.parametrize("family", ["reasoning", "choice", "code", "procedural"])
def test_prompts_serve_every_built_in_role(family):
    prompts = Prompts.load(family)
    item = {"question": "What {is} 1+1?", "letters": "A, B, C"}
    for topology in ("sequential", "hierarchical", "stitch", "single"):
        agents = TOPOLOGIES[topology].agents
        texts = [prompts.messages(agent.role, item)[-1]["content"] for agent in agents]
        assert all("What {is} 1+1?" in text and "{{" not in text for text in texts)
        form = {"reasoning": "\\boxed{}", "choice": "A, B, C", "code": "```python", "procedural": "</answer>"}[family]
        assert [form in text for text in texts] == [agent is agents[-1] for agent in agents]


def test_collator_packs_what_the_tokenizer_writes():
    tokenizer = build_tokenizer()
    prompts = Prompts({"sender": {"user": "see {evidence}"}, "solver": {"system": "s", "user": "{question}"}})
    items = [{"evidence": "A 1", "question": "A?", "answer": "1"}, {"evidence": "", "question": "", "answer": "12"}]
    batch = Collator(TOPOLOGIES["relay"], prompts, tokenizer)(items)
    assert [a.name for a in TOPOLOGIES["relay"].agents] == ["sender", "solver"]
    for agent, ids, lengths in zip(("sender", "solver"), batch["prompt_ids"], batch["prompt_lengths"], strict=True):
        expected = [
            tokenizer.apply_chat_template(prompts.messages(agent, item), add_generation_prompt=True, return_dict=False)
            for item in items
        ]
        assert [row.tolist() for row in ids.split(lengths)] == expected
    answers = [tokenizer(text).input_ids + [tokenizer.eos_token_id] for text in ("1", "12")]
    assert [row.tolist() for row in batch["answer_ids"].split(batch["answer_lengths"])] == answers


def test_tokenizer_is_lossless():
    tokenizer = build_tokenizer()
    for text in ("A7 B12 C0", "B123 AB1 A1b", "Zoë’s 3½ ducks — 42 %\n\n  \tend", "日本語 🦆", "\\boxed{70{,}000}"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_a_slot_with_its_value_is_one_token():
    tokenizer = build_tokenizer()
    assert tokenizer.tokenize(" A7 P15 B1.") == ["ĠA7", "ĠP15", "ĠB1", "."]
    assert tokenizer.tokenize("Recall B") == ["Recall", "ĠB"] and tokenizer.tokenize("12") == ["12"]


def test_pack_of_ragged_rows():
    ids, lengths = pack([[1, 2], [], [3]])
    assert ids.tolist() == [1, 2, 3] and lengths == [2, 0, 1]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("relay:slots", "allowed: name, or name:option=value"),
        ("relay:slots=4:slots=5", "every option once"),
        ("relay:size=4", "with {'size': 4}; allowed: integers for slots and values"),
        ("relay:slots=x", "with {'slots': 'x'}"),
        ("relay:slots=true", "with {'slots': True}"),
        ("relay:slots=99", "slots must be 1 to 16, got 99"),
    ],
)
def test_options_of_relay_that_are_refused(task, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_task(TaskArguments(task=task))


def test_options_of_relay():
    task = load_task(TaskArguments(task="relay:slots=3,values=7", eval_size=50))
    rows = [task.eval[i]["evidence"].split() for i in range(50)]
    assert {len(row) for row in rows} == {3}
    assert max(int(word[1:]) for row in rows for word in row) == 6
