"""Every task from small files in its hub schema, and from a hub that is not there."""

import csv
import gzip
import json
import os
import sys
import types
from collections import Counter

import pytest

from diffmas import train
from diffmas.answers import choice, code, mathematics
from diffmas.tasks import DRAWN, LOADERS, TaskArguments, load_task
from diffmas.tasks.base import NAMES, gold
from diffmas.tasks.math import SUBJECTS
from diffmas.tasks.mbpp import called

MATH_ROW = {"problem": "Half of $x$?", "level": "Level 1", "type": "Algebra", "solution": r"So $\boxed{\frac{x}{2}}$."}
ARC_ROW = {"id": "1", "question": "Hot?", "choices": {"text": ["ice", "sun", "fog"], "label": ["1", "2", "3"]}}
BOOK_ROW = {"id": "1", "question_stem": "Hot?", "choices": {"text": ["ice", "sun"], "label": ["A", "B"]}}
FIVE = {"text": ["v", "w", "x", "y", "z"], "label": ["A", "B", "C", "D", "E"]}
MED_ROW = {"id": "1", "sent1": "A fever?", "sent2": "", "label": 2} | {f"ending{i}": f"cause {i}" for i in range(4)}
SVAMP_ROW = {"ID": "chal-1", "Body": "Ana had 9 pens. She lost 2.", "Question": "How many has she?", "Answer": 7.0}
SPLIT_ROW = {"question": "Dr. Li had 3.5 pies. She ate 1.5. How many are left?", "answer": "3.5-1.5=2\n#### 2"}
GPQA_ROW = {"Question": "Spin?", "Correct Answer": "1/2", "Record ID": "rec1"}
GPQA_ROW |= {f"Incorrect Answer {i}": str(i) for i in (1, 2, 3)}
EVAL_ROW = {
    "task_id": "HumanEval/0", "prompt": "import math\n\n\ndef root(x: int) -> int:\n    \"\"\"The root.\"\"\"\n",
    "canonical_solution": "    return math.isqrt(x)\n", "entry_point": "root",
    "test": "def check(candidate):\n    assert candidate(9) == 3\n    assert candidate(17) == 4\n",
}  # fmt: skip
MBPP_TESTS = ["assert set(pairs(2)) == {(0, 1)}", "assert pairs(0) == []"]
MBPP_CODE = "def pairs(n):\n    return [(i, i + 1) for i in range(n - 1)]"
MBPP_ROW = {"task_id": 2, "text": "Write pairs.", "code": MBPP_CODE, "test_list": MBPP_TESTS, "test_setup_code": ""}
PLUS_ROW = {
    "task_id": 2, "code": MBPP_CODE, "prompt": '"""\nWrite pairs.\nassert pairs(0) == []\n"""\n', "test_imports": [],
    "test_list": MBPP_TESTS, "test": "import numpy as np\nfor n in (2, 5):\n    assert len(pairs(n)) == n - 1\n",
}  # fmt: skip

#: Task: (training rows, evaluation rows, the evaluation's right answer, hub id and split of both)
TASKS = {
    "svamp": (
        [SVAMP_ROW, {**SVAMP_ROW, "Body": "Bo had 4. He lost 2."}], [SVAMP_ROW], "7",
        ("ChilleD/SVAMP", None, "train"), ("ChilleD/SVAMP", None, "test"),
    ),
    "gsm8k:split": (
        [SPLIT_ROW, {**SPLIT_ROW, "question": "How many are 2?"}, {**SPLIT_ROW, "question": "Two pies. How many?"}],
        [SPLIT_ROW], "2", ("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test"),
    ),
    "gsm8k": (
        [{"question": "q", "answer": "work\n#### 1,000"}], [{"question": "q", "answer": "#### -7"}], "-7",
        ("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test"),
    ),
    "math": (
        [MATH_ROW], [{**MATH_ROW, "answer": r"\frac{x}{2}", "unique_id": "1"}], r"\frac{x}{2}",
        ("EleutherAI/hendrycks_math", "algebra", "train"), ("HuggingFaceH4/MATH-500", None, "test"),
    ),
    "aime24": (
        [MATH_ROW], [{"id": 60, "problem": "p", "solution": "...", "answer": "033", "year": "2024"}], "33",
        ("EleutherAI/hendrycks_math", "algebra", "train"), ("HuggingFaceH4/aime_2024", None, "train"),
    ),
    "aime25": (
        [MATH_ROW], [{"id": 0, "problem": "p", "answer": "70"}], "70",
        ("EleutherAI/hendrycks_math", "algebra", "train"), ("yentinglin/aime_2025", None, "train"),
    ),
    "gpqa": (
        [{**GPQA_ROW, "Question": "Mass?"}, GPQA_ROW], [GPQA_ROW], None,
        ("Idavidrein/gpqa", "gpqa_extended", "train"), ("Idavidrein/gpqa", "gpqa_diamond", "train"),
    ),
    "arc_easy": (
        [{**ARC_ROW, "answerKey": "1"}], [{**ARC_ROW, "answerKey": "2"}], "B",
        ("allenai/ai2_arc", "ARC-Easy", "train"), ("allenai/ai2_arc", "ARC-Easy", "test"),
    ),
    "arc_challenge": (
        [{**ARC_ROW, "answerKey": "1"}], [{**ARC_ROW, "answerKey": "3"}], "C",
        ("allenai/ai2_arc", "ARC-Challenge", "train"), ("allenai/ai2_arc", "ARC-Challenge", "test"),
    ),
    "openbookqa": (
        [{**BOOK_ROW, "answerKey": "A"}], [{**BOOK_ROW, "answerKey": "B"}], "B",
        ("allenai/openbookqa", "main", "train"), ("allenai/openbookqa", "main", "test"),
    ),
    "commonsenseqa": (
        [{"question": "q", "choices": FIVE, "answerKey": "A"}], [{"question": "q", "choices": FIVE, "answerKey": "E"}],
        "E", ("tau/commonsense_qa", None, "train"), ("tau/commonsense_qa", None, "validation"),
    ),
    "medqa": (
        [MED_ROW], [MED_ROW], "C",
        ("GBaker/MedQA-USMLE-4-options-hf", None, "train"), ("GBaker/MedQA-USMLE-4-options-hf", None, "test"),
    ),
    "humaneval": (
        [MBPP_ROW], [EVAL_ROW], None,
        ("google-research-datasets/mbpp", "full", "train"), ("openai/openai_humaneval", None, "test"),
    ),
    "humaneval+": (
        [MBPP_ROW], [EVAL_ROW], None,
        ("google-research-datasets/mbpp", "full", "train"), ("evalplus/humanevalplus", None, "test"),
    ),
    "mbpp+": (
        [MBPP_ROW, {**MBPP_ROW, "task_id": 601}], [PLUS_ROW], MBPP_CODE,
        ("google-research-datasets/mbpp", "full", "train"), ("evalplus/mbppplus", None, "test"),
    ),
}  # fmt: skip


def write(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)


def test_every_task_is_listed_and_tested():
    assert tuple(LOADERS) == NAMES and set(TASKS) == set(NAMES) - set(DRAWN)


def test_help_lists_the_tasks(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert ", ".join(NAMES) + ", rg:name" in shown


@pytest.mark.parametrize("name", TASKS)
def test_task_from_local_files(name, tmp_path, confinement):
    if name == "math":
        pytest.importorskip("math_verify")
    training, evaluation, answer, *_ = TASKS[name]
    write(tmp_path / "train.jsonl", training)
    write(tmp_path / "test.jsonl.gz", evaluation)
    task = load_task(TaskArguments(task=name, data_dir=str(tmp_path), eval_size=3))
    assert task.name == name and len(task.eval) == len(evaluation) and len(task.train) == 1
    assert answer in (None, gold(task.eval[0])) and isinstance(task.train[0]["answer"], str)
    item = task.eval[0]
    if name != "aime24":  # whose solutions end as their author liked
        assert task.check(item["answer"], item) and task.extract(item["answer"])
    assert not task.check("", item) and task.extract("") is None
    assert not task.check("It cannot be said.", item)
    for text in ("\0", "\\boxed{", "\\boxed{}", "```python\n", "#" * 10_000, "🦆", "{question}"):
        assert not task.check(text, item)
    assert task.prompts.messages("solver", item)[-1]["content"].endswith(": " + item["question"])


@pytest.mark.parametrize("name", TASKS)
def test_task_from_the_hub(name, monkeypatch):
    if name == "math":
        pytest.importorskip("math_verify")
    training, evaluation, _, train_source, eval_source = TASKS[name]
    asked = []

    def load_dataset(hub, config=None, *, split):
        asked.append((hub, config, split))
        return iter(evaluation if (hub, config, split) == eval_source else training)

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    task = load_task(TaskArguments(task=name, train_size=1))
    assert asked == [eval_source], "training items are read before anybody looks at them"
    assert len(task.train) == 1 and asked[1] == train_source
    subjects = len(SUBJECTS) if "hendrycks" in train_source[0] else 1
    assert len(asked) == 1 + subjects


def test_without_datasets_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"install diffmas\[data\], or give --data_dir"):
        load_task(TaskArguments(task="medqa"))
    (tmp_path / "test.parquet").touch()
    with pytest.raises(ModuleNotFoundError, match="convert test.parquet to JSON lines"):
        load_task(TaskArguments(task="medqa", data_dir=str(tmp_path)))


def test_an_evaluation_needs_no_training_file(tmp_path):
    write(tmp_path / "HumanEval.jsonl.gz", [EVAL_ROW])
    task = load_task(TaskArguments(task="humaneval", data_dir=str(tmp_path)))
    assert len(task.eval) == 1
    with pytest.raises(FileNotFoundError, match="task humaneval finds none of its files.*train.jsonl, "):
        len(task.train)


def test_the_layouts_of_folders(tmp_path):
    for i, subject in enumerate(SUBJECTS):
        (tmp_path / subject).mkdir()
        write(tmp_path / subject / "train.jsonl", [MATH_ROW] * (i + 1))
    write(tmp_path / "aime25.jsonl", TASKS["aime25"][1])
    task = load_task(TaskArguments(task="aime25", data_dir=str(tmp_path)))
    assert len(task.eval) == 1 and len(task.train) == 28
    with (tmp_path / "gpqa_diamond.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, GPQA_ROW)
        writer.writeheader()
        writer.writerow(GPQA_ROW | {"Question": 'A, "b"\nc'})
    assert (
        load_task(TaskArguments(task="gpqa", data_dir=str(tmp_path))).eval[0]["question"].startswith('A, "b"\nc\nA) ')
    )


def test_parquet(tmp_path):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "data").mkdir()
    rows = datasets.Dataset.from_list([MED_ROW] * 3)
    rows.to_parquet(str(tmp_path / "data" / "test-00000-of-00001.parquet"))
    assert len(load_task(TaskArguments(task="medqa", data_dir=str(tmp_path))).eval) == 3


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("arc_easy", {"answerKey": "9"}, "answerKey is '9'; allowed: 1, 2, 3"),
        ("arc_easy", {"choices": None}, "answerKey is '2'"),
        ("arc_easy", {"question": " "}, "the question is missing"),
        ("medqa", {"label": 4}, "number 4; allowed: 0 to 3"),
        ("medqa", {"ending2": None}, "ending2 is missing"),
        ("commonsenseqa", {"choices": {"text": ["x"] * 27, "label": list("ABCDEFGHI") * 3}}, "options are 27"),
        ("aime25", {"answer": "x + 1"}, "the gold answer is 'x \\+ 1'; allowed: an integer"),
        ("math", {"answer": "", "solution": "none"}, "the gold answer is missing"),
        ("gpqa", {"Incorrect Answer 2": ""}, "Incorrect Answer 2 is missing"),
        ("humaneval+", {"entry_point": ""}, "entry_point is missing"),
        ("mbpp+", {"test": None}, "test is missing"),
    ],
)
def test_bad_rows(task, change, message, tmp_path):
    good = TASKS[task][1][0]
    write(tmp_path / "test.jsonl", [good, {**good, **change}])
    with pytest.raises(ValueError, match=f"task {task.replace('+', '.')}, [a-z]+ item 2: .*{message}"):
        load_task(TaskArguments(task=task, data_dir=str(tmp_path)))


def test_bad_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="data_dir: no such folder"):
        load_task(TaskArguments(task="medqa", data_dir=str(tmp_path / "missing")))
    (tmp_path / "test.csv").write_text("id,question\n")
    with pytest.raises(ValueError, match="test.csv is empty"):
        load_task(TaskArguments(task="medqa", data_dir=str(tmp_path)))


def test_options_are_shuffled_the_same_way_each_time(tmp_path):
    rows = [{**GPQA_ROW, "Question": f"Question {i}?"} for i in range(400)]
    write(tmp_path / "test.jsonl", rows)
    first, again = (load_task(TaskArguments(task="gpqa", data_dir=str(tmp_path))).eval for _ in range(2))
    assert first == again
    counts = Counter(item["gold"] for item in first)
    assert set(counts) == set("ABCD") and min(counts.values()) > 60
    assert all(item["options"]["ABCD".index(item["gold"])] == "1/2" for item in first)


def test_the_function_that_tests_call():
    assert called(MBPP_TESTS) == "pairs" and called(["assert 1 == 1"]) is None and called([]) is None
    assert called(["assert math.isclose(area(2), 4)"]) == "area"


def test_checkers_belong_to_their_tasks(tmp_path):
    kinds = {"gsm8k": mathematics, "arc_easy": choice, "mbpp+": code}
    for name, kind in kinds.items():
        write(tmp_path / "test.jsonl", TASKS[name][1])
        task = load_task(TaskArguments(task=name, data_dir=str(tmp_path)))
        assert (task.check, task.extract) == (kind.check, kind.extract)


def test_programs_are_run(tmp_path, confinement):
    write(tmp_path / "test.jsonl", [EVAL_ROW])
    task = load_task(TaskArguments(task="humaneval+", data_dir=str(tmp_path)))
    item = task.eval[0]
    right = "```python\ndef root(x):\n    return math.isqrt(x)\n```"
    assert task.check(right, item), "imports of the prompt are not there"
    for wrong in ("return x // 3", "return int(x ** 0.25)", "import sys; sys.exit(0)"):
        assert not task.check(right.replace("return math.isqrt(x)", wrong), item)
    write(tmp_path / "test.jsonl", [PLUS_ROW])
    task = load_task(TaskArguments(task="mbpp+", data_dir=str(tmp_path)))
    assert task.check(task.eval[0]["answer"], task.eval[0])
    assert not task.check(task.eval[0]["answer"].replace("n - 1", "n"), task.eval[0])


def test_every_reference_answer_of_the_real_files(tmp_path):
    """GSM8K's own files, where `DIFFMAS_GSM8K` names their folder; otherwise a few made in their form."""
    folder = os.environ.get("DIFFMAS_GSM8K")
    if folder is None:
        folder = str(tmp_path)
        for split in ("train", "test"):
            write(
                tmp_path / f"{split}.jsonl",
                [{"question": "q", "answer": f"{n} <<1+1=2>>2\n#### {n:,}"} for n in (0, 7, 1000, 1_234_567, -3)],
            )
    task = load_task(TaskArguments(task="gsm8k", data_dir=folder))
    for item in [*task.eval, *task.train]:
        assert task.check(item["answer"], item) and task.extract(item["answer"]) == item["gold"]
        assert not task.check(item["answer"] + "1", item)
