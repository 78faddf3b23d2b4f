"""Tasks: loading, held-out items, extraction and checking, prompts, and what each refuses."""

import json

import pytest

from diffmas.data import Collator, pack
from diffmas.embedded.tokenizer import build_tokenizer
from diffmas.prompts import Prompts
from diffmas.tasks import TaskArguments, gsm8k, load_task, relay
from diffmas.topology import TOPOLOGIES

CHECKS = [
    ("The total is 70,000 dollars.", "70000", True),
    ("70", "70000", False),
    ("70,000", "70", False),
    (r"so \boxed{70{,}000}", "70000", True),
    (r"\boxed{\$1{,}250.50}", "1250.5", True),
    (r"\boxed{\text{A}}", "A", True),
    (r"\boxed{\text{b}}", "B", True),
    (r"\boxed{3} apples and 4 pears", "3", True),
    (r"first \boxed{3}, rather \boxed{4}", "4", True),
    (r"\boxed{\frac{1}{2}}", "0.5", False),
    (r"\boxed{12", "12", True),
    ("#### 18", "18", True),
    ("4 + 5 = 9\n#### 9\n", "9", True),
    ("####", "9", False),
    ("She has 5-10", "10", True),
    ("it is -10", "-10", True),
    ("it is -10", "10", False),
    ("3.0", "3", True),
    ("costs $12.50.", "12.5", True),
    (".5", "0.5", True),
    ("1,2", "12", False),
    ("1,234,567", "1234567", True),
    ("12,34", "1234", False),
    ("50%", "50", True),
    ("no number", "1", False),
    ("", "1", False),
    ("7 8 9", "9", True),
    ("9 then 8", "9", False),
]


@pytest.mark.parametrize(("prediction", "gold", "right"), CHECKS)
def test_gsm8k_check(prediction, gold, right):
    assert gsm8k.check(prediction, {"answer": "worked out", "gold": gold}) is right


def test_equal_answers_extract_equally():
    same = [r"\boxed{1{,}250.50}", "so 1,250.5", "#### $1250.500", "+1250.5"]
    assert {gsm8k.extract(text) for text in same} == {"1250.5"}
    assert gsm8k.extract("none") is None and gsm8k.extract(r"\boxed{\text{Yes}}") == "yes"
    assert [relay.extract(text) for text in ("7", " 07.", "it is 12", "", "x")] == ["7", "7", "12", None, None]


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
    with pytest.raises(ValueError, match="gold answer is missing"):
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
    with pytest.raises(ValueError, match="names the field 'question'; the item has text"):
        prompts.messages("solver", {"text": "q"})


@pytest.mark.parametrize("topology", ["sequential", "hierarchical", "stitch", "single"])
def test_reasoning_prompts_serve_every_built_in_role(topology):
    prompts = Prompts.load("reasoning")
    for agent in TOPOLOGIES[topology].agents:
        assert "What {is} 1+1?" in prompts.messages(agent.role, {"question": "What {is} 1+1?"})[-1]["content"]


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
