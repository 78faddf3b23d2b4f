"""A run's own date: what its model's chat template writes, whatever day it is evaluated, resumed or talked to."""

import json
import shutil
from datetime import date, datetime

import pytest
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from diffmas import eval as evaluate
from diffmas import train
from diffmas.agents.topology import TOPOLOGIES
from diffmas.conversation.chat import load
from diffmas.conversation.settings import ChatArguments
from diffmas.evaluation.methods import TextChannel
from diffmas.evaluation.records import read_records
from diffmas.generation import Decoding
from diffmas.loading import build_system
from diffmas.runs.settings import SystemArguments
from diffmas.tasks import TaskArguments, load_task

#: As Llama 3.2 asks for the day.
TEMPLATE = (
    "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
    "{{- 'Today Date: ' + date_string + '\\n' }}"
    "{% for m in messages %}{{ '<|user|>' + m['content'] }}{% endfor %}{{ '<|assistant|>' }}"
)


class Someday(datetime):
    """A clock that the test sets."""

    day = (2031, 3, 4)

    @classmethod
    def now(cls, zone=None):
        return cls(*cls.day, 17, 30)


@pytest.fixture
def clock(monkeypatch):
    """`clock(year, month, day)` sets today, for templates and for us."""

    class Day(date):
        @classmethod
        def today(cls):
            return date(*Someday.day)

    monkeypatch.setattr(chat_template_utils, "datetime", Someday)
    monkeypatch.setattr("diffmas.prompts.dates.date", Day)
    return lambda *day: monkeypatch.setattr(Someday, "day", day)


@pytest.fixture
def dated(base, tmp_path):
    """A base model whose template writes the day."""
    folder = tmp_path / "dated"
    shutil.copytree(base, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def test_a_run_keeps_its_date(flags, dated, clock, tmp_path, capsys):
    given = flags(model=dated, max_steps=2, eval_size=3)
    assert train.main(given) == 0
    assert "the chat template writes a date: 2031-03-04" in capsys.readouterr().out
    run = tmp_path / "run"
    assert json.loads((run / "system.json").read_text())["task"]["date"] == "2031-03-04"
    whole = [r.prompt for r in read_records(run / "eval.jsonl")]
    assert all("Today Date: 04 Mar 2031\n" in prompt for prompt in whole)
    clock(2031, 3, 5)
    assert evaluate.main([f"--run={run}", "--disable_tqdm=true"]) == 0
    assert [r.prompt for r in read_records(run / "eval" / "eval.jsonl")] == whole
    loaded = load(ChatArguments(run=str(run)))
    *_, ids = loaded._collator.encode_prompts([dict(question="q", evidence="e")])["prompt_ids"]
    assert "04 Mar 2031" in loaded.tokenizer.decode(ids)
    (run / "adapter_model.safetensors").unlink()
    assert train.main([*given, f"--resume_from_checkpoint={run}"]) == 0
    assert [r.prompt for r in read_records(run / "eval.jsonl")] == whole
    assert train.main([*given, f"--resume_from_checkpoint={run}", "--date=2031-03-05"]) == 2
    assert "date is '2031-03-05', but the run to go on with had '2031-03-04'" in capsys.readouterr().err


def test_methods_keep_their_date(flags, dated, clock, tmp_path):
    command = [*flags(model=dated, eval_size=2, max_steps=1, output_dir=None), f"--run={tmp_path / 'out'}"]
    assert evaluate.main([*command, "--methods=single"]) == 0
    clock(2031, 3, 5)
    assert evaluate.main([*command, "--methods=single,text,diffmas"]) == 0
    records = read_records(tmp_path / "out" / "items.jsonl")
    assert {r.method for r in records} == {"single", "text", "diffmas"}
    assert all("04 Mar 2031" in r.prompt and "05 Mar" not in r.prompt for r in records)


def test_kept_texts_are_of_their_date(dated, tmp_path):
    args = SystemArguments(model_name_or_path=str(dated), topology="relay")
    task = load_task(TaskArguments(date="2031-03-04"))
    system, tokenizer = build_system(args)
    keys = []
    for day in ("2031-03-04", "2031-03-05", "2031-03-04"):
        dated_task = load_task(TaskArguments(date=day))
        channel = TextChannel(system, dated_task, tokenizer, TOPOLOGIES["relay"], Decoding())
        keys.append(channel.kept_in(tmp_path)._decided_by)
    assert keys[0] == keys[2] != keys[1] and task.prompts.date == "2031-03-04"


@pytest.mark.parametrize("day", ["tomorrow", "2031-13-01", "31.3.2031"])
def test_no_date(flags, capsys, day):
    assert train.main(flags(date=day)) == 2
    assert f"date is {day!r}; allowed: a date such as 2026-01-31" in capsys.readouterr().err


def test_a_date_that_no_template_writes_is_not_told(flags, capsys):
    assert train.main(flags(max_steps=1, disable_final_eval=True)) == 0
    assert "writes a date" not in capsys.readouterr().out
