"""`diffmas.show`: what agents read of an item, token by token, and what the last one is taught."""

import json
import re

import pytest
from chat_families import FAMILIES

from diffmas import show, train
from diffmas.agents.collator import Collator
from diffmas.agents.topology import TOPOLOGIES, Topology, load_topology
from diffmas.conversation.preview import preview, tokens_shown
from diffmas.loading import load_run
from diffmas.prompts import Prompts
from diffmas.tasks import TaskArguments, load_task

ITEM = {"question": "a\n\nthe 日?", "answer": "yes", "reasoning": "since the day"}


@pytest.mark.parametrize("name", FAMILIES)
def test_all_tokens_are_there(name):
    family = FAMILIES[name]
    tokenizer = family.tokenizer()
    (ids,) = Prompts({"single": {"user": "{question}"}}, date="2026-01-02", chat_template_kwargs=family.options).encode(
        "single", [ITEM], tokenizer
    )
    shown = tokens_shown(ids, tokenizer).plain
    marked = re.findall(r"⟦(.*?)⟧", shown)
    added = {i: t.content for i, t in tokenizer.added_tokens_decoder.items() if t.content.strip()}
    assert marked == [added[i] for i in ids if i in added] and marked
    # Phi's tokens are marks with a "|" of their own.
    plain = re.sub(r"⟦.*?⟧", "⟦⟧", shown)
    assert plain.count("|") == len(ids) - 1
    text = re.sub(r"⟦(.*?)⟧", lambda found: found[0].replace("|", "¦"), shown).replace("|", "").replace("¦", "|")
    text = text.replace("⟦", "").replace("⟧", "").replace("⏎", "")
    assert text == tokenizer.decode(ids)


def test_what_each_agent_reads_and_the_last_is_taught():
    tokenizer = FAMILIES["R1-distill"].tokenizer()
    prompts = Prompts({name: {"system": "S.", "user": name + " {question}"} for name in ("sender", "solver")})
    lines = [line.plain for line in preview(Collator(TOPOLOGIES["relay"], prompts, tokenizer), ITEM, 7)]
    text = "\n".join(lines)
    assert "question: a\n\nthe 日?" in text
    for agent in ("sender", "solver"):
        assert re.search(
            rf"^{agent} reads \d+ tokens, 4 of them control tokens \(role {agent}; messages: system, user\)", text, re.M
        )
    assert "\nbehind nothing\n" in text and "\nbehind 7 latent steps of sender\n" in text
    assert "⟦<｜Assistant｜>⟧|⟦<think>⟧|⏎\n" in text
    for sink, said in ((2, "the first 2 tokens"), ("auto", "as many of the first tokens as the model rests on")):
        collator = Collator(load_topology("relay", "latent", sink), prompts, tokenizer)
        text = "\n".join(line.plain for line in preview(collator, ITEM, 7))
        assert f"\nbehind {said} of sender, then 7 latent steps of sender\n" in text
    taught = text[text.index("solver is taught") :]
    assert "2 of them control tokens" in taught and "|⟦</think>⟧|⏎\n⏎\n|y|e|s|⟦<｜end▁of▁sentence｜>⟧" in taught
    full = Topology("t", TOPOLOGIES["relay"].agents, "full")
    lines = [line.plain for line in preview(Collator(full, prompts, tokenizer), ITEM, 7)]
    assert "behind prompt and 7 latent steps of sender" in lines
    collate = Collator(full, prompts, tokenizer)([ITEM])
    read, answer = sum(len(ids) for ids in collate["prompt_ids"]), len(collate["answer_ids"])
    assert lines[-1] == f"altogether {read} prompt tokens, 7 latent steps, {answer} answer tokens"


def test_the_command_shows_what_a_training_reads(flags, team_flags, tmp_path, capsys):
    assert show.main(["--task=relay", "--index", "3"]) == 0
    out, item = capsys.readouterr().out, load_task(TaskArguments()).train[3]
    assert f"question: {item['question']}" in out and f"{item['answer']}|⟦<|end|>⟧" in out
    assert "behind 8 latent steps of sender" in out
    given = [*team_flags(latent_steps=2), "--system_prompt=Look at {question}.", "--split=eval"]
    assert show.main([*given, "--index=1"]) == 0
    out, item = capsys.readouterr().out, load_task(TaskArguments()).eval[1]
    assert (
        out.count("messages: system, user") == 3
        and "first reads" in out
        and "behind 2 latent steps of first, second" in out
    )
    assert f"question: {item['question']}" in out
    assert train.main(flags(max_steps=1, disable_final_eval=True, system_prompt="Be brief.")) == 0
    capsys.readouterr()
    assert show.main([f"--run={tmp_path / 'run'}", "--index=5"]) == 0
    out = capsys.readouterr().out
    assert load_run(tmp_path / "run").system.prompts.system == "Be brief." and out.count("messages: system, user") == 2


def test_prompts_that_were_cut_are_named(flags, tmp_path, capsys):
    line = json.dumps({"question": "q " * 99, "answer": "a"}) + "\n"
    (tmp_path / "own.jsonl").write_text(2 * line)
    given = flags(task=tmp_path / "own.jsonl", topology="single", max_prompt_tokens=80, eval_size=1)
    assert show.main(given) == 0
    assert "max_prompt_tokens 80: 1 items were cut" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--index=-1"], "index is -1; allowed: 0 to 131071, the train items of relay"),
        (["--split=test"], "split is 'test'; allowed: train or eval"),
        (["--run=nowhere"], "run nowhere has no system.json"),
        (["--chat_template_kwargs={"], 'chat_template_kwargs is \'{\'; allowed: a JSON object'),
        (["--task=nothing"], "task is 'nothing'; allowed: relay"),
    ],
)  # fmt: skip
def test_what_cannot_be_shown_is_said(given, said, capsys):
    assert show.main(given) == 2
    assert said in capsys.readouterr().err


def test_flags_beside_a_run_are_refused(capsys):
    with pytest.raises(SystemExit):
        show.main(["--run=nowhere", "--task=relay"])
    assert "unrecognized arguments: --task=relay" in capsys.readouterr().err
