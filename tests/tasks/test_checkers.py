"""Checkers of `.jsonl` tasks: chosen from the right answers or asked for, and passed by every right answer."""

import json

import pytest

from diffmas.sandbox import SandboxError
from diffmas.tasks import TaskArguments, checkers, jsonl, load_task

PROGRAM = "```python\ndef f(x):\n    return x + 1\n```"


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jsonl._announce.cache_clear()

    def loaded(golds, checker=None, *, fields=None, **options):
        items = [{"question": f"q{i}", "answer": gold, **(fields or {})} for i, gold in enumerate(golds)]
        (tmp_path / "data.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
        return load_task(TaskArguments(task="data.jsonl", checker=checker, **options))

    return loaded


#: Right answers of a file, the kind chosen for them, what counts for the last one and what does not.
CHOSEN = [
    (["A", "A"], "choice", ["A", "The answer is A.", "\\boxed{A}", "(a)"], ["B", "", "A bird"]),
    (["A", "J"], "choice", ["J", "The answer is (J)."], ["I", "A"]),
    (["Paris", "Paris"], "text", ["Paris", "The answer is Paris.", "\\boxed{\\text{Paris}}"], ["Not Paris but London"]),
    (["no", "yes", "Yes"], "text", ["Yes", "yes", "Yes, it is."], ["no", "No, yes is wrong."]),
    (["Rome", "New York"], "text", ["new york", "Answer: New York."], ["York", "New"]),
    (["2024-01-04", "2024-01-05"], "text", ["2024-01-05", "It is 2024-01-05."], ["2018", "-5", "2024-01-5"]),
    (["11:30", "12:30"], "text", ["12:30", "The answer is 12:30."], ["12/30", "30", "2/5", "12.30"]),
    (["(3, 4)", "(1,2)"], "text", ["(1, 2)", "(1,2)"], ["(2,1)", "1, 2", "12"]),
    (["7", "1e3"], "mathematics", ["1000", "1,000.0", "1e3"], ["13", "3", "1"]),
    (["7", "-5"], "mathematics", ["−5", "-5", "\\boxed{−5}"], ["5", "−6"]),
    (["−4", "−5"], "mathematics", ["−5", "-5"], ["5"]),
    ([51.0, 51.0], "mathematics", ["51", "51.0", "The answer is 51."], ["510", "5"]),
    (["work\n#### 1", "work\n#### 1,000"], "mathematics", ["1000"], ["1"]),
    (["so \\boxed{3}", "so \\boxed{4}"], "mathematics", ["4", "\\boxed{4}"], ["3", "so"]),
    (["3", "4", "even"], "text", ["even", "Even."], ["odd", "not even"]),
    (["4", "x^2", "even"], "mathematics", ["\\boxed{\\text{even}}"], ["odd"]),
    (["Paris", "1984"], "text", ["1984", "It was in 1984."], ["84", "Paris"]),
    (["x", "10 Downing Street"], "text", ["10 Downing Street"], ["10"]),
    (["C", "C++"], "text", ["C++"], ["C", "C+"]),
    ([True, False], "text", ["False", "false."], ["True"]),
    (["3-5", "10-12"], "text", ["10-12", "10–12"], ["-2", "12"]),
    (["1/5/2024", "2/5/2024"], "text", ["2/5/2024"], ["2/5", "2024"]),
    (["$5", "$70,000"], "mathematics", ["70000", "$70,000"], ["70"]),
    (["50%", "20%"], "mathematics", ["20", "20%"], ["2"]),
    (["北京", "東京"], "text", ["東京", "東京。"], ["北京"]),
]  # fmt: skip


@pytest.mark.parametrize(("golds", "kind", "right", "wrong"), CHOSEN)
def test_the_kind_is_chosen_from_the_right_answers(load, capsys, golds, kind, right, wrong):
    task = load(golds)
    said = capsys.readouterr().out
    assert said == f"checker: {kind}, chosen from the right answers in data.jsonl (--checker names another)\n"
    (item,) = task.eval
    assert {text: task.check(text, item) for text in [*right, *wrong]} == dict.fromkeys(right, True) | dict.fromkeys(
        wrong, False
    )
    assert task.check(item["answer"], item) and len({task.extract(text) for text in right}) <= 2


def test_a_kind_that_was_asked_for_is_not_announced(load, capsys):
    task = load(["Paris", "Paris"], "exact")
    assert capsys.readouterr().out == "" and not task.check("paris", task.eval[0])


@pytest.mark.parametrize(
    ("golds", "checker", "number", "gold"),
    [
        (["Paris", "Rome"], "choice", 1, "Paris"), (["A", "AB"], "choice", 2, "AB"),
        (["I cannot.", PROGRAM], "code", 1, "I cannot."), 
        (["A", "Paris"], "choice", 2, "Paris"),
    ],
)  # fmt: skip
def test_a_right_answer_that_would_count_as_wrong_is_named(load, golds, checker, number, gold):
    with pytest.raises(
        ValueError, match=f"data.jsonl item {number}: the right answer '{gold}' does not pass the checker"
    ):
        load(golds, checker, fields={"test": "assert f(1) == 2"})


def test_an_item_of_the_evaluation_file_is_named(load, tmp_path):
    (tmp_path / "held_out.jsonl").write_text('{"question": "q", "answer": "B"}\n{"question": "q", "answer": "Rome"}\n')
    with pytest.raises(ValueError, match="held_out.jsonl item 2: the right answer 'Rome' does not pass"):
        load(["A"], "choice", eval_file="held_out.jsonl")


def test_options(load):
    for listed in (["Rome", "Paris", "Oslo"], {"A": "Rome", "B": "Paris", "C": "Oslo"}):
        task = load(["A", "(B)"], fields={"options": listed})
        (item,) = task.eval
        assert item["question"] == "q1\nA) Rome\nB) Paris\nC) Oslo" and item["letters"] == "A, B, C"
        assert all(task.check(text, item) for text in ("B", "Paris", "\\boxed{B}"))
        assert not any(task.check(text, item) for text in ("A", "Rome", "D"))
    with pytest.raises(ValueError, match="item 2: the right answer is 'D'; allowed: the letter of one of its options"):
        load(["A", "D"], fields={"options": ["x", "y"]})


SEA = "In 1492, 3 ships sailed west. How many days did they sail before turning 24 degrees?"
ROME = "Capital of Italy?"
CITIES = ["Paris", "Rome"]


@pytest.mark.parametrize(
    ("question", "listed", "shown"),
    [
        (SEA, ["1", "2", "3", "4"], False),
        ("Which letter is a vowel in the word 'cab'?", ["a", "b", "c", "d"], False),
        ("Is Paris or Rome the capital?", CITIES, False),
        ("Which is best?\nParis\nRome", CITIES, False),
        (f"{ROME} A) Rome B) Paris", CITIES, False),
        (f"{ROME}\nA) Parisian\nB) Rome", CITIES, False),
        (f"{ROME}\nA) Paris\nB) Rome", CITIES, True),
        (f"{ROME} (a) Paris (b) Rome", CITIES, True),
        (f"{ROME}\n**A.** Paris\n**B.** Rome", CITIES, True),
        (f"{ROME}\nA: Paris, B: Rome", CITIES, True),
        (f"{SEA}\nA. 1\nB. 2\nC. 3", [1, 2, 3], True),
        (f"{ROME}\nA. Paris\nB. Rome", ["A. Paris", "B. Rome"], True),
        (f"{SEA}\nA. 1\nB. 22", [1, 2], False),
    ],
)
def test_options_are_shown_once(load, question, listed, shown):
    (item,) = load(["A", "B"], fields={"question": question, "options": listed}).eval
    lines = "".join(f"\n{letter}) {option}" for letter, option in zip("ABCD", listed, strict=False))
    assert item["question"] == (question if shown else question + lines)


@pytest.mark.parametrize(
    "listed",
    [
        ["A. Paris", "B. Rome"], ["(A) Paris", "(B) Rome"], {"A": "A) Paris", "B": "B) Rome"},
        {"B": "Rome", "A": "Paris"}, {"A": "Paris", "B": "Rome"}, {"b": "Rome", "a": "Paris"},
        {"text": ["Paris", "Rome"], "label": ["A", "B"]}, {"label": ["B", "A"], "text": ["Rome", "Paris"]},
    ],
)  # fmt: skip
def test_options_keep_their_letters(load, listed):
    task = load(["A", "B"], fields={"options": listed})
    (item,) = task.eval
    assert item["question"] == "q1\nA) Paris\nB) Rome" and item["options"] == ["Paris", "Rome"]
    assert {s: task.check(s, item) for s in ("The answer is Rome", "B", "Paris", "A")} == {
        "The answer is Rome": True, "B": True, "Paris": False, "A": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    "listed",
    [
        {"A": "x", "C": "y"}, {"C": "x", "B": "y"}, {"1": "x", "2": "y"}, {"A": "x", "a": "y"}, {},
        {"text": ["x", "y"], "label": ["A", "C"]}, {"text": ["x", "y"], "label": ["A"]}, {"text": "x", "label": "y"},
    ],
)  # fmt: skip
def test_options_with_other_letters_are_refused(load, listed):
    with pytest.raises(ValueError, match="data.jsonl item 1: the (letters of its options are|right answer is)"):
        load(["A", "B"], fields={"options": listed})


def test_ten_options(load):
    task = load(["A", "J"], fields={"options": [f"o{i}" for i in range(10)]})
    assert task.check("The answer is (J).", task.eval[0]) and task.check("o9", task.eval[0])
    assert task.eval[0]["letters"].endswith("I, J") and "J) o9" in task.eval[0]["question"]


def test_programs(load, confinement):
    tests = {"test": "def check(candidate):\n    assert candidate(1) == 2\n", "entry_point": "f"}
    task = load([PROGRAM, PROGRAM], fields=tests)
    (item,) = task.eval
    assert task.check(PROGRAM, item) and not task.check(PROGRAM.replace("+ 1", "+ 2"), item)
    with pytest.raises(ValueError, match="item 2: the right answer .* does not pass the checker 'code'"):
        load([PROGRAM, PROGRAM.replace("+", "-")], fields=tests)
    task = load([PROGRAM, PROGRAM], fields={"test": ["assert f(1) == 2", "assert f(2) == 3"]})
    assert task.check(PROGRAM, task.eval[0]) and not task.check(PROGRAM.replace("x +", "1 +"), task.eval[0])
    with pytest.raises(ValueError, match="item 1: the tests are missing"):
        load([PROGRAM, PROGRAM], "code")


def test_programs_where_none_can_be_run(load, monkeypatch):
    def refuse():
        raise SandboxError("nothing here")

    monkeypatch.setattr(checkers.code, "ready", refuse)
    task = load([PROGRAM, PROGRAM], fields={"test": "assert f(1) == 2"})
    with pytest.raises(SandboxError):
        task.ready()


OWN = {
    "good": "return item['answer'].lower() in text.lower()",
    "number": "return 1",
    "none": "pass",
    "raises": "raise KeyError('x')",
    "never": "return False",
    "later": "return {'Rome': True, 'Oslo': True}[text]",
}


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_checker.py").write_text(
        "value = 1\n" + "".join(f"def {name}(text, item):\n    {body}\n" for name, body in OWN.items())
    )
    (tmp_path / "broken_checker.py").write_text("1 / 0\n")
    monkeypatch.delitem(__import__("sys").modules, "own_checker", raising=False)


def test_a_checker_of_one_s_own(load, own):
    task = load(["Oslo", "Rome"], "own_checker:good")
    assert task.check("it is rome", task.eval[0]) and not task.check("Oslo", task.eval[0])
    assert not task.check("<think>rome</think> Oslo", task.eval[0]) and not task.check("<think>rome", task.eval[0])
    assert task.extract("The answer is Rome.") == "rome"


@pytest.mark.parametrize(
    ("checker", "message"),
    [
        ("own_checker:number", "'own_checker:number' returned 1 on 'Oslo'; allowed: True or False"),
        ("own_checker:none", "returned None"), ("own_checker:raises", "raised KeyError: 'x' on 'Oslo'"),
        ("own_checker:never", "item 1: the right answer 'Oslo' does not pass the checker 'own_checker:never'"),
        ("own_checker:value", "own_checker has no function value"), ("own_checker:gone", "has no function gone"),
        ("nowhere_checker:f", "importing nowhere_checker raised ModuleNotFoundError"),
        ("broken_checker:f", "importing broken_checker raised ZeroDivisionError"),
        ("own_checker:", "allowed: module:function"), (":f", "allowed: module:function"), ("a b:c", "allowed: module"),
        ("math", "checker is 'math'; allowed: mathematics, choice, exact, text, code, or module:function"),
        ("", "checker is ''; allowed"),
    ],
)  # fmt: skip
def test_bad_checkers(load, own, checker, message):
    with pytest.raises(ValueError, match=message):
        load(["Oslo", "Rome"], checker)


def test_what_one_s_own_checker_does_later_is_named_too(load, own):
    task = load(["Oslo", "Rome"], "own_checker:later")
    with pytest.raises(ValueError, match="checker 'own_checker:later' raised KeyError: 'Bonn' on 'Bonn'"):
        task.check("Bonn", task.eval[0])


def test_other_tasks_have_checkers_of_their_own():
    with pytest.raises(ValueError, match="checker is 'text' with task 'relay'; allowed: where task is a .jsonl file"):
        load_task(TaskArguments(checker="text"))
