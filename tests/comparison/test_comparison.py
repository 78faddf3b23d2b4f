"""One evaluator for all methods: what each spends, what it reads, what it was trained on, and going on after a kill."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffmas import eval as evaluate
from diffmas import train
from diffmas.agents.controls import CONTROLS
from diffmas.agents.topology import load_topology
from diffmas.command_line import parse_training
from diffmas.comparison import session
from diffmas.comparison.comparison import ITEMS_FILE, Comparison, Options, Settings
from diffmas.comparison.trained import trained_otherwise
from diffmas.evaluation.methods import METHODS, TextChannel, choose_methods
from diffmas.evaluation.methods.text_cache import TextCache, base_fingerprint
from diffmas.evaluation.records import read_records
from diffmas.evaluation.session import load_held_out
from diffmas.generation import Decoding
from diffmas.loading import build_system
from diffmas.runs.files import ADAPTER_FILE
from diffmas.tasks import TaskArguments, load_task
from diffmas.training.checkpoints import latest

#: Fewer tokens than the prompts of relay have.
LIMIT = 18
OPTIONS = Options(samples=2, batch_size=3, max_message_tokens=4)


def compare(folder, flags, methods="single,latent", seeds=(0,), options=OPTIONS, **others):
    tasks = {"relay": flags}
    return Comparison(folder, tasks, choose_methods(methods), seeds, options=options, show_progress=False, **others)


def answers(records):
    """Everything but the time it took, by key."""
    return {r.key: {k: v for k, v in asdict(r).items() if k != "seconds"} for r in records}


def test_every_method_answers_every_item_once_and_accounts_for_it(flags, tmp_path):
    compare(tmp_path / "out", flags(), "all").run()
    path = tmp_path / "out" / ITEMS_FILE
    records = read_records(path)
    cells = Counter((r.method, r.control) for r in records)
    expected = {(m.name, c): 5 * 2 for m in METHODS.values() for c in m.controls}
    assert cells == expected and len(path.read_text().splitlines()) == len(records)
    prompts = {m: {r.index: r.prefill_tokens for r in records if r.method == m} for m in METHODS}
    for r in records:
        talks, thinks = (
            r.method.startswith("text"),
            "matched" in r.control and CONTROLS.keys() <= set(METHODS[r.method].controls),
        )
        assert (r.latent_steps == 2 * 2) == (thinks or r.control != "matched")
        assert (0 < r.message_tokens <= 2 * 4) == talks and 1 <= r.tokens == len(r.entropies) <= 3
        assert r.logprob <= 0 and all(e >= 0 for e in r.entropies) and r.seconds > 0
        # Every agent's prompt is read once; texts are read by whom they are written for.
        assert r.prefill_tokens == prompts["diffmas"][r.index] or r.method.startswith(("single", "text"))
    assert all(prompts["text"][i] > prompts["diffmas"][i] > prompts["single"][i] for i in range(5))
    before = path.read_bytes()
    compare(tmp_path / "out", flags(), "all").run()
    assert path.read_bytes() == before


def test_methods_agree_with_the_run_s_own_evaluation(flags, tmp_path):
    run = tmp_path / "run"
    assert train.main([*flags(max_steps=12, seed=7), f"--output_dir={run}", "--disable_tqdm=true"]) == 0
    command = [f"--run={run}", "--methods=single,latent,diffmas", "--batch_size=4", "--disable_tqdm=true"]
    assert evaluate.main(command) == 0
    own = [json.loads(line) for line in (run / "eval.jsonl").open()]
    by_variant = {(r["variant"], r["index"]): r["answer"] for r in own}
    variant = {"single": "single", "latent": "training_free"}
    compared = read_records(run / "methods" / ITEMS_FILE)
    checked = Counter()
    for r in compared:
        name = variant.get(r.method, r.control)
        if r.control == "matched" or r.method == "diffmas":
            assert r.answer == by_variant[name, r.index]
            checked[name] += 1
    assert set(checked) == {"single", "training_free", *CONTROLS}
    assert not (run / "methods" / "training").exists(), "the run's own adapter is the method diffmas"
    answered = {v: [by_variant[v, i] for i in range(5)] for v in ("matched", "training_free")}
    assert answered["matched"] != answered["training_free"], "training changed nothing: the test would see nothing"


def text_channel(flags, topology):
    system_args, task_args, _, _ = parse_training(flags)
    task, team = load_task(task_args), load_topology(str(topology))
    system, tokenizer = build_system(system_args, METHODS["text"].topology(team))
    return TextChannel(system, task, tokenizer, team, Decoding(max_new_tokens=4, temperature=0)), task, tokenizer


def test_texts_go_into_the_prompts_behind_and_come_from_the_untrained_model(flags, tmp_path):
    channel, task, tokenizer = text_channel(flags(), tmp_path / "team.yaml")
    items = [task.eval[i] for i in range(3)]
    reading = channel.read(items, [0, 1, 2])
    system = channel.system
    texts = {}
    for agent, before in (("first", ()), ("second", ("first",))):
        chats = [
            task.prompts.messages("sender", item, [(n, texts[n][i]) for n in before]) for i, item in enumerate(items)
        ]
        prompts = [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in chats]
        rows = [system.generate([torch.tensor(p)], [[len(p)]], tokenizer, channel.decoding) for p in prompts]
        texts[agent] = [row[0][0].text for row in rows]
    for i, ids in enumerate(reading.prompt_ids[0].split(reading.prompt_lengths[0])):
        for name in texts:
            assert texts[name][i].strip() in tokenizer.decode(ids)
    assert "[first]" in task.prompts.messages("sender", items[0], [("first", "text")])[-1]["content"]
    with torch.no_grad():
        for name, parameter in system.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    again = channel.read(items, [0, 1, 2])
    assert torch.equal(again.prompt_ids[0], reading.prompt_ids[0])
    batch = channel(items)
    assert batch["prompt_lengths"] == reading.prompt_lengths
    golds = [tokenizer(item["answer"]).input_ids + [tokenizer.eos_token_id] for item in items]
    assert [row.tolist() for row in batch["answer_ids"].split(batch["answer_lengths"])] == golds


def test_trained_methods_share_items_steps_and_rate(flags, tmp_path):
    compare(tmp_path / "out", flags(), "single+sft,text+sft,stitch+train,diffmas,diffmas+detach", seeds=(3,)).run()
    systems = {
        path.parent.parent.name: json.loads(path.read_text())
        for path in (tmp_path / "out").glob("training/relay/*/seed-3/system.json")
    }
    assert len(systems) == 5
    assert len({json.dumps([s["training"], s["task"]]) for s in systems.values()}) == 1
    assert systems["diffmas"]["training"]["seed"] == 3
    assert [s["system"]["detach_trace"] for s in systems.values()].count(True) == 1
    agents = {name: [a["receives"] for a in s["topology"]["agents"]] for name, s in systems.items()}
    assert agents["stitch+train"] == [[], [], ["first", "second"]] and agents["text+sft"] == agents["single+sft"] == [
        []
    ]
    assert agents["diffmas"] == agents["diffmas+detach"] == [[], ["first"], ["second"]]


def test_only_methods_with_senders_restate(flags, tmp_path):
    """`single+sft` shares the settings, and has nobody who could."""
    compare(tmp_path / "out", flags(restate_steps=1, max_steps=2), "single+sft,diffmas").run()
    paths = (tmp_path / "out").glob("training/relay/*/seed-0/system.json")
    training = {path.parent.parent.name: json.loads(path.read_text())["training"] for path in paths}
    assert {name: settings["restate_steps"] for name, settings in training.items()} == {"single+sft": 0, "diffmas": 1}


def test_seeds_repeat_nothing_where_nothing_is_drawn(flags, tmp_path):
    summary = compare(tmp_path / "greedy", flags(temperature=0), seeds=(0, 1)).run()
    greedy = read_records(tmp_path / "greedy" / ITEMS_FILE)
    assert {r.seed for r in greedy if r.control != "noise"} == {0}
    noise = [[r for r in greedy if (r.seed, r.control) == (seed, "noise")] for seed in (0, 1)]
    assert len(noise[0]) == len(noise[1]) == 5 * 2 and [r.logprob for r in noise[0]] != [r.logprob for r in noise[1]]
    assert {c["control"]: c["seeds"] for c in summary["cells"] if c["method"] == "latent"}["noise"] == [0, 1]
    noise = next(d for d in summary["differences"] if d["b_control"] == "noise")
    assert noise["items"] == 5, "paired with the one greedy answer"
    compare(tmp_path / "drawn", flags(), seeds=(0, 1)).run()
    drawn = read_records(tmp_path / "drawn" / ITEMS_FILE)
    answered = [[r.answer for r in drawn if r.seed == seed] for seed in (0, 1)]
    assert len(answered[0]) == len(answered[1]) and answered[0] != answered[1]


def test_other_settings_are_refused_and_more_seeds_are_not(flags, tmp_path):
    out = tmp_path / "out"
    compare(out, flags()).run()
    for changed in (flags(latent_steps=3), flags(temperature=0.5), flags(learning_rate=1), flags(train_size=7)):
        name = next(f for f in changed if f not in flags()).split("=")[0].strip("-")
        with pytest.raises(ValueError, match=f"{name} of relay is .* allowed: the same"):
            compare(out, changed).run()
    with pytest.raises(ValueError, match="samples of options is 3"):
        compare(out, flags(), options=replace(OPTIONS, samples=3)).run()
    before = len(read_records(out / ITEMS_FILE))
    summary = compare(out, flags(), "single", seeds=(0, 1)).run()
    assert len(read_records(out / ITEMS_FILE)) == before + 10
    seeds = {c["method"]: c["seeds"] for c in summary["cells"] if c["control"] == "matched"}
    assert seeds == {"single": [0, 1], "latent": [0]}


def test_only_one_method_cuts_the_gradient_whatever_the_run_has_set(flags, tmp_path, capsys):
    methods = "stitch+train,diffmas,diffmas+detach"
    comparison = compare(tmp_path / "out", flags(detach_trace=True), methods)
    settings = comparison.settings["relay"]
    cut = [comparison._system_args(method, settings).detach_trace for method in comparison.methods]
    assert cut == [False, False, True]
    config = tmp_path / "run.yaml"
    config.write_text("detach_trace: true")
    for given in ("--detach_trace=true", f"--config={config}"):
        assert evaluate.main([f"--run={tmp_path / 'new'}", "--methods=diffmas", given]) == 2
        assert "detach_trace is given with methods" in capsys.readouterr().err


def test_texts_to_train_on_are_written_once(flags, tmp_path, monkeypatch):
    """Not again for another epoch, to group by length, for another seed or after a kill; and training sees the same."""
    written = Counter()
    write, kept_in = TextChannel._write, TextChannel.kept_in

    def count(channel, items, seeds):
        written["training" if channel._kept else "answering"] += len(items)
        return write(channel, items, seeds)

    monkeypatch.setattr(TextChannel, "_write", count)
    # Three epochs of eight items.
    given = flags(train_size=8, max_steps=6, train_sampling_strategy="group_by_length")
    compare(tmp_path / "out", given, "text+sft", seeds=(0, 1)).run()
    assert written == {"training": 8, "answering": 2 * 5}
    seed = tmp_path / "out" / "training" / "relay" / "text+sft" / "seed-0"
    weights = load_file(seed / ADAPTER_FILE)
    (seed / "summary.json").unlink()
    for gone in ("checkpoint-4", "checkpoint-6"):
        shutil.rmtree(seed / gone)
    (tmp_path / "out" / ITEMS_FILE).unlink()
    compare(tmp_path / "out", given, "text+sft").run()
    assert written == {"training": 8, "answering": 3 * 5}
    resumed = load_file(seed / ADAPTER_FILE)
    monkeypatch.setattr(TextChannel, "kept_in", lambda channel, folder: channel)
    compare(tmp_path / "uncached", given, "text+sft").run()
    assert written["answering"] == 4 * 5 + 8 + 3 * 8, "without the cache: once to group, once an epoch"
    plain = load_file(tmp_path / "uncached" / "training" / "relay" / "text+sft" / "seed-0" / ADAPTER_FILE)
    for name, value in plain.items():
        assert torch.equal(value, weights[name]) and torch.equal(value, resumed[name])
    # Longer texts are other texts.
    monkeypatch.setattr(TextChannel, "kept_in", kept_in)
    shutil.copytree(tmp_path / "out" / "training", tmp_path / "longer" / "training")
    compare(tmp_path / "longer", given, "text+sft", seeds=(2,), options=replace(OPTIONS, max_message_tokens=5)).run()
    assert written["training"] == 8 + 8


def test_a_cache_of_texts_that_is_none(tmp_path):
    (tmp_path / "texts.sqlite").write_text("not a database, but text that is longer than the header of one is" * 20)
    with pytest.raises(OSError, match="texts.sqlite: .*; it can be deleted"):
        TextCache(tmp_path / "texts.sqlite")


def test_another_base_is_another_one(flags):
    system, _ = build_system(parse_training(flags())[0])
    before = base_fingerprint(system.agent_model.model)
    trained, frozen = (
        next(p for p in system.agent_model.model.parameters() if p.requires_grad == wanted) for wanted in (True, False)
    )
    with torch.no_grad():
        trained += 1
        assert base_fingerprint(system.agent_model.model) == before
        frozen.view(-1)[0] += 1e-3
        assert base_fingerprint(system.agent_model.model) != before


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--methods=singel"], "methods has ['singel']; allowed: all, or any of single"),
        (["--methods=single", "--seeds=0,0"], "seeds is '0,0'; allowed: different integers"),
        (["--methods=single", "--controls=nothing"], "controls has ['nothing']"),
        (["--methods=single", "--task_config=nowhere.yaml"], "task_config is 'nowhere.yaml': no such file"),
        (["--methods=single", "--samples=0"], "samples is 0"),
        (["--methods=single", "--batch_size=1"], "batch_size is 1"),
        (["--methods=text", "--max_message_tokens=0"], "max_message_tokens is 0"),
        (["--methods=single", "--seed=3"], "seed is 3; allowed: only without --methods"),
        (["--samples=2"], "samples is 2; allowed: only with --methods"),
    ],
)
def test_bad_values_are_named(tmp_path, capsys, given, message):
    assert evaluate.main([f"--run={tmp_path / 'new'}", *given]) == 2
    assert message in capsys.readouterr().err


def test_settings_of_a_task_are_used_or_refused(tmp_path, capsys):
    (tmp_path / "tasks.yaml").write_text("relay:slots=4: {eval_size: 0}\n")
    command = [f"--run={tmp_path / 'new'}", "--methods=single", f"--task_config={tmp_path / 'tasks.yaml'}"]
    assert evaluate.main(command) == 2 and "eval_size is 0" in capsys.readouterr().err
    (tmp_path / "tasks.yaml").write_text("realy: {eval_size: 3}\n")
    assert (
        evaluate.main(command) == 2 and "task_config has ['realy']; allowed: the tasks relay" in capsys.readouterr().err
    )
    (tmp_path / "tasks.yaml").write_text("{")
    assert evaluate.main(command) == 2 and "is not valid YAML" in capsys.readouterr().err


def test_a_run_s_data_folder_is_for_its_own_task(tmp_path, monkeypatch):
    task = {"task": "gsm8k", "data_dir": "there"}
    described = {"system": {"model_name_or_path": None}, "topology": {}, "task": task, "decoding": {}}
    (tmp_path / "system.json").write_text(json.dumps(described))
    given = {}

    def compare(folder, flags, *arguments, **options):
        given.update({name: Settings(f, evaluate.PROGRAM).task.data_dir for name, f in flags.items()})
        raise ValueError("enough")

    monkeypatch.setattr(session, "Comparison", compare)
    command = [f"--run={tmp_path}", "--methods=single", "--tasks=gsm8k,relay"]
    assert evaluate.main(command) == 2 and given == {"gsm8k": "there", "relay": None}
    assert evaluate.main([*command, "--data_dir=here"]) == 2 and given == {"gsm8k": "here", "relay": "here"}


def test_an_adapter_counts_for_the_settings_it_was_trained_with(flags):
    def other(method="diffmas", before=None, **changes):
        run = Settings(flags(**(before or {})), evaluate.PROGRAM)
        description = {**run.describe(), "topology": METHODS[method].topology(run.topology).to_dict()}
        now = Settings(flags(**changes), evaluate.PROGRAM)
        return trained_otherwise(now, METHODS[method], json.loads(json.dumps(description)))

    assert other() is None and other("stitch+train") is None
    assert other(eval_size=3, temperature=0, checkpointing="all") is None
    assert other(latent_steps=3) == "latent_steps 2" and other(learning_rate=1) == "learning_rate 0.01"
    assert other(adam_beta2=0.95) == "adam_beta2 0.999" and other(adam_epsilon=1e-6) == "adam_epsilon 1e-08"
    assert other(lr_scheduler_kwargs='{"num_cycles": 2}') == "lr_scheduler_kwargs None"
    cycles = dict(lr_scheduler_kwargs='{"num_cycles": 2}')
    assert (
        other(before=cycles, lr_scheduler_kwargs='{"num_cycles": 3}') == """lr_scheduler_kwargs '{"num_cycles": 2}'"""
    )
    assert other(before=cycles, **cycles) is None
    assert other(task="relay:slots=3") == "task 'relay'" and other("diffmas+detach") == "detach_trace False"


def test_no_item_that_was_trained_on_is_evaluated(tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps({"question": f"{i}+1", "answer": i + 1}) + "\n" for i in range(20)))
    found = load_held_out(TaskArguments(task=str(path), eval_size=2), 4).eval
    assert [item["question"] for item in found] == ["16+1", "17+1"]
    for size in (0, 5):
        with pytest.raises(ValueError, match=f"eval_size is {size}; allowed: 1 to 4"):
            load_held_out(TaskArguments(task=str(path), eval_size=size), 4)
    assert len(load_held_out(TaskArguments(eval_size=30), 4).eval) == 30


def kill_when(process, condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for stream in (process.stdout, process.stderr):
        stream.close()


def test_kill_in_training_and_in_evaluation(flags, tmp_path):
    """Killed at both, and gone on with: the same answers as in one go, each once."""
    given = [*flags(max_steps=30, eval_size=16), "--methods=single,diffmas", "--samples=2", "--batch_size=4"]
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "diffmas.eval", *given, f"--run={out}", "--disable_tqdm=true"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    training = out / "training" / "relay" / "diffmas" / "seed-0"
    kill_when(subprocess.Popen(command, **pipes), lambda: latest(training)[0] is not None)
    reached = latest(training)[0]
    assert reached.name != "checkpoint-30" and not (training / "summary.json").exists()
    single = (out / ITEMS_FILE).read_bytes()
    assert single.count(b"\n") == 16 * 2

    def answered():
        return (out / ITEMS_FILE).read_bytes().count(b"\n")

    kill_when(subprocess.Popen(command, **pipes), lambda: answered() > 16 * 2)
    assert 16 * 2 < answered() < 5 * 16 * 2
    with (out / ITEMS_FILE).open("ab") as file:
        file.write(b'{"task": "relay", "meth')
    partial = read_records(out / ITEMS_FILE)
    assert evaluate.main([*command[3:]]) == 0
    assert (out / ITEMS_FILE).read_bytes().startswith(single)
    records = read_records(out / ITEMS_FILE)
    assert records[: len(partial)] == partial, "an answer that was there was taken again"
    assert (out / ITEMS_FILE).read_bytes().count(b"\n") == len(records) == 5 * 16 * 2
    assert evaluate.main([*given, f"--run={tmp_path / 'whole'}", "--disable_tqdm=true"]) == 0
    assert answers(records) == answers(read_records(tmp_path / "whole" / ITEMS_FILE))
    cells = [json.loads((tmp_path / p / "summary.json").read_text())["cells"] for p in ("killed", "whole")]
    assert [c["accuracy"] for c in cells[0]] == [c["accuracy"] for c in cells[1]]
    assert all(c["answers"] == 32 for c in cells[0])


def test_what_was_cut_is_counted_once_an_item_and_kept(flags, tmp_path):
    """Also where several methods cut an item differently, and when the same comparison is asked for again."""
    short = [*flags(), f"--max_prompt_tokens={LIMIT}"]
    summary = compare(tmp_path / "out", short, "text,latent,single").run()
    longest = {
        r.index: max(s.cut_tokens for s in read_records(tmp_path / "out" / ITEMS_FILE) if s.index == r.index)
        for r in read_records(tmp_path / "out" / ITEMS_FILE)
    }
    assert summary["cut"]["relay"] == {"max_prompt_tokens": LIMIT, "items": 5, "tokens": sum(longest.values())}
    assert compare(tmp_path / "out", short, "text,latent,single").run()["cut"] == summary["cut"]


def test_settings_of_a_comparison_that_recorded_nothing_bind_nobody(flags, tmp_path):
    folder = tmp_path / "out"
    with pytest.raises(ValueError, match="max_prompt_tokens is 3"):
        compare(folder, [*flags(), "--max_prompt_tokens=3"]).run()
    compare(folder, flags()).run()
    with pytest.raises(ValueError, match="had 3|but the records"):
        compare(folder, [*flags(), "--max_new_tokens=2"]).run()


def items(path, values):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"question": f"say {v}", "answer": str(v)}) + "\n" for v in values))
    return str(path)


def test_tasks_of_alike_names_have_trainings_of_their_own(flags, tmp_path):
    tasks = [items(tmp_path / "a" / "t.jsonl", range(9)), items(tmp_path / "a_t.jsonl", range(20, 29))]
    names = {str(task).replace(f"{tmp_path}/", ""): flags(task=task, prompts="reasoning") for task in tasks}
    comparison = Comparison(tmp_path / "out", names, choose_methods("single+sft"), [0], options=OPTIONS)
    comparison.run()
    trained = [json.loads(p.read_text())["task"]["task"] for p in (tmp_path / "out").rglob("system.json")]
    assert sorted(trained) == sorted(tasks)


@pytest.mark.parametrize("which", ["train", "eval"])
def test_items_that_changed_since_are_named(flags, tmp_path, which):
    task = items(tmp_path / "t.jsonl", range(12))
    given = flags(task=task, prompts="reasoning", eval_size=3)
    Comparison(tmp_path / "out", {task: given}, choose_methods("single"), [0], options=OPTIONS).run()
    items(tmp_path / "t.jsonl", [*range(9), 7, 8, 9] if which == "eval" else [5, *range(1, 12)])
    with pytest.raises(ValueError, match="the items of .* changed since the records"):
        Comparison(tmp_path / "out", {task: given}, choose_methods("single,single+sft"), [0], options=OPTIONS).run()


def test_an_adapter_that_changed_since_is_named(flags, tmp_path):
    run = tmp_path / "run"
    assert train.main([*flags(topology="relay", save_steps=4), f"--output_dir={run}", "--disable_final_eval"]) == 0
    argv = [f"--run={run}", "--methods=diffmas", "--controls=matched", "--disable_tqdm"]
    assert evaluate.main(argv) == 0
    weights = load_file(run / ADAPTER_FILE)
    save_file({name: value + 1 for name, value in weights.items()}, run / ADAPTER_FILE)
    assert evaluate.main(argv) == 2


def test_another_row_is_a_different_one(flags, tmp_path):
    """Where the next row is the same, its trace is the row's own."""
    task = items(tmp_path / "t.jsonl", [*range(8), 1, 1, 2, 2])
    given = flags(task=task, prompts="reasoning", eval_size=4, temperature=0, topology="sequential")
    Comparison(tmp_path / "out", {task: given}, choose_methods("latent"), [0], options=Options(batch_size=4)).run()
    found = {(r.control, r.index): r.logprob for r in read_records(tmp_path / "out" / ITEMS_FILE)}
    assert all(found["mismatched", i] != found["matched", i] for i in range(4))


def test_items_that_are_all_the_same_have_no_other_row(flags, tmp_path, capsys):
    task = items(tmp_path / "t.jsonl", [*range(8), 1, 1, 1])
    given = flags(task=task, prompts="reasoning", eval_size=3, topology="sequential", output_dir=tmp_path / "run")
    assert train.main([*given, "--max_steps=1"]) == 0
    assert "not evaluated: trained, another row's trace" in capsys.readouterr().out
