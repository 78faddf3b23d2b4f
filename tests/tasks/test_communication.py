"""Tasks that need communication: what each agent reads, what that says of the answer, and what is held out."""

import json
import re
from collections import Counter

import pytest

from diffmas.agents.topology import TOPOLOGIES
from diffmas.answers import mathematics
from diffmas.command_line import parse_training
from diffmas.tasks import TaskArguments, divided, facts, load_task, tally, two_hop, words

#: Task, the fields that are private to senders, and the topology.
DRAWN = {
    "facts": (("evidence",), "relay"),
    "facts:n=1": (("evidence",), "relay"),
    "facts:n=2:places=2": (("evidence",), "relay"),
    "facts:n=8:noise=5": (("evidence",), "relay"),
    "two_hop": (("first", "second"), "senders"),
    "two_hop:n=7": (("first", "second"), "senders"),
    "tally": (("first", "second"), "senders"),
    "tally:n=1:top=3:ask=sum": (("first", "second"), "senders"),
    "tally:ask=difference:top=2": (("first", "second"), "senders"),
}


def read_by(task, role, item):
    return "\n".join(message["content"] for message in task.prompts.messages(role, item))


def items_of(name, size=300):
    task = load_task(TaskArguments(task=name, train_size=size, eval_size=size))
    return task, [task.train[i] for i in range(size)], [task.eval[i] for i in range(size)]


@pytest.mark.parametrize("name", DRAWN)
def test_items_are_their_own_and_held_out(name):
    task, train, held_out = items_of(name)
    assert items_of(name)[1:] == (train, held_out) and all(task.check(i["answer"], i) for i in train + held_out)
    assert not {item["content"] for item in train} & {item["content"] for item in held_out}
    other = load_task(TaskArguments(task=name, train_size=5000, eval_size=9, task_seed=3))
    assert not {other.train[i]["content"] for i in range(0, 5000, 17)} & {item["content"] for item in held_out}


@pytest.mark.parametrize("name", DRAWN)
def test_who_reads_what(name):
    private, topology = DRAWN[name]
    task, items, _ = items_of(name, 20)
    roles = [agent.role for agent in TOPOLOGIES[topology].agents]
    for item in items:
        assert item["question"] in read_by(task, "solver", item)
        assert all(item[field] in read_by(task, "single", item) for field in (*private, "question"))
        for role, field in zip(roles[:-1], private, strict=True):
            assert item[field] in read_by(task, role, item) and item["question"] not in read_by(task, role, item)
        # What a role reads depends on its own field alone.
        for role, own in zip(roles, (*private, "question"), strict=True):
            others = {key: "?" for key in item if key != own}
            assert read_by(task, role, {**item, **others}) == read_by(task, role, item)


@pytest.mark.parametrize("name", ["facts", "two_hop"])
def test_the_question_says_nothing_of_the_place(name):
    task, train, held_out = items_of(name, 4000)
    assert all(task.extract(read_by(task, "solver", item)) is None for item in train[:300])
    # The place that went most often with each of the question's words, in training.
    seen = {}
    for item in train:
        for word in set(re.findall(r"\w+", item["question"])):
            seen.setdefault(word, Counter())[item["gold"]] += 1
    right = 0
    for item in held_out:
        votes = Counter()
        for word in set(re.findall(r"\w+", item["question"])):
            votes.update({place: n / seen[word].total() for place, n in seen.get(word, {}).items()})
        right += votes.most_common(1)[0][0] == item["gold"]
    # Chance is 1 in 40, one standard deviation 0.0025.
    assert right / len(held_out) < 1 / 40 + 0.01


def test_the_question_says_no_quantity():
    task, items, _ = items_of("tally", 300)
    assert not [item for item in items if re.search(r"\d", read_by(task, "solver", item))]


def test_facts_are_what_is_told():
    for item in items_of("facts:n=6:noise=3")[1]:
        known = {(who, thing): place for who, thing, place in eval(item["content"])}
        told = [s for s in re.split(r"(?<=\.) ", item["evidence"]) if words.place(s)]
        assert len(known) == len(told) == 6
        for (who, thing), place in known.items():
            assert [words.place(s) for s in told if re.search(rf"\b{who}\b", s) and f" {thing}" in s] == [place]
        asked = [pair for pair in known if all(re.search(rf"\b{word}\b", item["question"]) for word in pair)]
        assert [known[pair] for pair in asked] == [item["gold"]]


def test_people_and_things_come_back():
    for item in items_of("facts:n=8")[1][:50]:
        known = eval(item["content"])
        assert len({who for who, *_ in known}) <= 4 and len({thing for _, thing, _ in known}) <= 4


def test_two_hops_are_needed():
    for item in items_of("two_hop")[1]:
        assert words.place(item["first"]) is None
        assert not any(re.search(rf"\b{person}\b", item["second"]) for person in words.PEOPLE)
        known = {pair: (container, place) for pair, container, place in eval(item["content"])}
        assert len({container for container, _ in known.values()}) == len(known) == 4
        asked = [pair for pair in known if all(re.search(rf"\b{word}\b", item["question"]) for word in pair)]
        (container, place), *more = (known[pair] for pair in asked)
        assert not more and place == item["gold"]
        # Followed in the texts themselves.
        (hop,) = (s for s in re.split(r"(?<=\.) ", item["first"]) if container in s)
        assert all(word in hop for word in asked[0])
        (hop,) = (s for s in re.split(r"(?<=\.) ", item["second"]) if container in s.lower())
        assert words.place(hop) == place


@pytest.mark.parametrize("kind", tally.ASKED)
def test_a_tally_needs_both_senders(kind):
    for item in items_of(f"tally:ask={kind}")[1]:
        known = {who: (quantity, thing) for who, quantity, thing in eval(item["content"])}
        a, b = (who for who in known if re.search(rf"\b{who}\b", item["question"]))
        assert known[a][1] == known[b][1]
        assert (a in item["first"]) + (b in item["first"]) == 1 == (a in item["second"]) + (b in item["second"])
        first, second = known[a][0], known[b][0]
        assert int(item["gold"]) == (first + second if kind == "sum" else abs(first - second)) > 0
        for who, (quantity, _) in known.items():
            (told,) = (s for s in re.split(r"(?<=\.) ", item["first"] + " " + item["second"]) if who in s)
            assert re.findall(r"\d+", told) == [str(quantity)]


def test_which_place_a_text_names():
    item = {"gold": "roof", "answer": "on the roof"}
    right = ("on the roof", "Roof.", "Ana left the hat on the roof, I think: the roof!", "<think>bus</think>The roof")
    assert all(words.names_place(text, item) for text in right)
    wrong = ("", "on the bus", "not on the bus but on the roof", "rooftop", "<think>on the roof")
    assert not any(words.names_place(text, item) for text in wrong)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("facts:n=0", "task is 'facts:n=0': n is 0; allowed: 1 to 32"),
        ("facts:n=x", "n is 'x'; allowed: 1 to 32"),
        ("facts:noise=true", "noise is True; allowed: 0 to 32"),
        ("facts:places=41", "places is 41; allowed: 2 to 40"),
        ("facts:size=3", "with option 'size'; allowed: n, noise, places"),
        ("two_hop:n=1", "n is 1; allowed: 2 to 16"),
        ("tally:ask=product", "ask is 'product'; allowed: sum, difference, both"),
        ("tally:top=1", "top is 1; allowed: 2 to 10000"),
    ],
)
def test_options_that_are_refused(task, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_task(TaskArguments(task=task))


@pytest.mark.parametrize("module", [facts, two_hop, tally])
def test_the_ends_of_every_option(module):
    name = module.__name__.rpartition(".")[2]
    for key, values in module.OPTIONS.items():
        for value in (values[0], values[-1]):
            task = load_task(TaskArguments(task=f"{name}:{key}={value}"))
            assert all(task.check(task.train[i]["answer"], task.train[i]) for i in range(10))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(("given", "gold"), [(51.0, "51"), ("51.0", "51"), (7, "7"), (0.5, "1/2"), (1200.0, "1200")])
def test_answers_of_svamp(given, gold):
    item = divided.svamp({"Body": "b.", "Question": "q?", "Answer": given})
    assert item["gold"] == item["answer"] or given == 0.5
    assert mathematics.check(f"So it is {gold}.", item)


def test_bad_rows_of_svamp(tmp_path):
    row = {"Body": "Ana had 9.", "Question": "How many?", "Answer": 9.0}
    for field, message in (("Body", "the Body is missing"), ("Answer", "the gold answer is 'nine'; allowed: a number")):
        for split in ("train", "test"):
            write(tmp_path / f"{split}.jsonl", [{**row, field: "" if field == "Body" else "nine"}])
        with pytest.raises(ValueError, match=f"task svamp, test item 1: {message}"):
            load_task(TaskArguments(task="svamp", data_dir=str(tmp_path)))


def test_no_story_is_trained_on_and_evaluated(tmp_path):
    rows = [{"Body": f"Ana had {i}.", "Question": "How many?", "Answer": float(i)} for i in range(8)]
    write(tmp_path / "train.jsonl", [*rows, {**rows[2], "Body": "ana  had 2.", "Question": "How many more?"}])
    write(tmp_path / "test.jsonl", rows[2:4])
    for size in (1, 6, None):
        task = load_task(TaskArguments(task="svamp", data_dir=str(tmp_path), train_size=size))
        assert [item["gold"] for item in task.train] == ["0", "1", "4", "5", "6", "7"][:size]


@pytest.mark.parametrize(
    ("text", "story", "question"),
    [
        ("A has 2. B has 3. How many?", "A has 2. B has 3.", "How many?"),
        ("Mr. Li paid $1.50 a day. How much in 2.5 days?", "Mr. Li paid $1.50 a day.", "How much in 2.5 days?"),
        ('He said "Stop!" It took 3 s. How long?', 'He said "Stop!" It took 3 s.', "How long?"),
        ("J. Doe ran 3 miles. 4 more follow. How far?  ", "J. Doe ran 3 miles. 4 more follow.", "How far?"),
        ("Two\nlines.\nHow many?", "Two\nlines.", "How many?"),
    ],
)
def test_gsm8k_in_two_parts(text, story, question):
    item = divided.split({"question": text, "answer": "work\n#### 5"})
    assert [item["evidence"], item["question"], item["gold"]] == [story, question, "5"]
    assert item["answer"] == "work\n#### 5"


def test_a_problem_of_one_sentence_is_left_out(tmp_path):
    assert divided.split({"question": "How many are 2.5 and Dr. Li's 3?", "answer": "#### 5"}) is None
    for split in ("train", "test"):
        write(tmp_path / f"{split}.jsonl", [{"question": "How many?", "answer": "#### 5"}])
    with pytest.raises(ValueError, match="task gsm8k:split can use none of the rows of test; allowed: at least one"):
        load_task(TaskArguments(task="gsm8k:split", data_dir=str(tmp_path)))


@pytest.mark.parametrize("name", ["svamp", "gsm8k:split"])
def test_who_reads_what_of_a_word_problem(name, tmp_path):
    row = {"Body": "Ana had 9.", "Question": "How many?", "Answer": 9.0}
    row |= {"question": "Ana had 9. How many?", "answer": "#### 9"}
    for split in ("train", "test"):
        write(tmp_path / f"{split}.jsonl", [row])
    task = load_task(TaskArguments(task=name, data_dir=str(tmp_path)))
    item = task.eval[0]
    assert "9" not in read_by(task, "solver", item) and "How many?" in read_by(task, "solver", item)
    assert "Ana had 9." in read_by(task, "sender", item) and "How many?" not in read_by(task, "sender", item)
    assert "Ana had 9. How many?" in read_by(task, "single", item)


def test_presets_are_configurations_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    system, task, decoding, training = parse_training(["--config=facts", "--max_steps=3", "--output_dir=out"])
    assert [system.model_name_or_path, system.topology, system.handover] == ["smollm2", "relay", "latent"]
    assert task.task.startswith("facts") and training.max_steps == 3 and decoding.temperature == 0
    # None of the settings for models that think.
    assert training.gradient_accumulation_steps == 1 and training.num_train_epochs == 3
    (tmp_path / "facts").write_text("task: tally\n")
    assert parse_training(["--config=facts", "--output_dir=out"])[1].task == "tally"


def test_the_preset_of_a_topology_lies_over_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given in ("--topology=two_models", "--config=two_models"):
        system, task, _, training = parse_training([given, "--output_dir=out"])
        assert [system.topology, system.alignment, task.task] == ["two_models", "soft", "relay:slots=4"]
        own, below = training.max_steps, parse_training(["--output_dir=out"])[3]
        assert own == 100 < below.max_steps and training.learning_rate == below.learning_rate
    # With a model, it is no embedded base that trains.
    assert parse_training(["--topology=two_models", "--model=x", "--output_dir=out"])[0].alignment == "identity"
