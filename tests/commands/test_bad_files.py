"""Files and folders that cannot be read or written, Ctrl-C, templates that refuse: a line that names it."""

import errno
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from diffmas import ablate, chat, train
from diffmas import eval as evaluate
from diffmas.agents.topology import load_topology
from diffmas.command_line import parse_training
from diffmas.comparison.comparison import Comparison
from diffmas.runs import weights
from diffmas.support import failures
from diffmas.support.atomic import write_atomically
from diffmas.system import MultiAgentSystem
from diffmas.tasks import load_task
from diffmas.tasks.jsonl import read
from diffmas.tasks.source import Source
from diffmas.training import session
from diffmas.training.trainer import SystemTrainer

ITEM = '{"question": "Was kostet ein Käse?", "answer": "3"}\n'


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """A finished run, copied before it is spoilt."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert train.main([
        f"--model={base}", "--task=relay", "--topology=relay", "--latent_steps=1", "--max_steps=1", "--use_cpu=true",
        "--per_device_train_batch_size=2", "--gradient_accumulation_steps=1", "--eval_size=4", "--max_new_tokens=2",
        "--disable_final_eval=true", "--disable_tqdm=true", f"--output_dir={folder}", "--alignment=learned",
        "--temperature=0",
    ]) == 0  # fmt: skip
    return folder


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "copy")


def one_line(capsys, *parts):
    """What was printed on standard error is one line, with all `parts` in it."""
    error = capsys.readouterr().err.strip()
    assert error.count("error:") == 1 and "\n" not in error[error.index("error:") :] and "Traceback" not in error
    assert all(str(part) in error for part in parts), error


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_byte_order_mark_is_read(tmp_path, mark, suffix):
    data = mark + (ITEM * 2).encode()
    path = tmp_path / f"items{suffix}"
    path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    assert read(path, name="task") == [json.loads(ITEM)] * 2


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_mark_in_csv_and_yaml(tmp_path, mark):
    (tmp_path / "test.csv").write_bytes(mark + b"question,answer\nq,1\n")
    rows = Source("hub", "test", ("test",)).rows(str(tmp_path), "t")
    assert rows == [{"question": "q", "answer": "1"}]
    (tmp_path / "t.yaml").write_bytes(mark + b"agents: [{name: a}]")
    assert load_topology(str(tmp_path / "t.yaml")).last.name == "a"


BAD_LINES = [
    (ITEM.encode("utf-16"), "is not UTF-8 (it begins like UTF-16)"),
    (ITEM.encode("utf-16-be"), "is not UTF-8 (byte 0xe4 in line 1)"),
    (b"\n" + ITEM.encode("latin-1"), "is not UTF-8 (byte 0xe4 in line 2)"),
    (b'{"question": "a \\ud800 b", "answer": "3"}', "line 1 has \\ud800 at character 3, half a surrogate pair"),
    (b'\n{"question": "q", "answer": ["\\udfff"]}', "answer of task: PATH line 2 has \\udfff"),
    (b'{"question": "a \x00 b", "answer": "3"}', "line 1 is not JSON: Invalid control character"),
    (b'{"question": "q", "answer": "1", "answer": "2"}', "line 1 is not JSON: the field 'answer' is there more than"),
    (b'{"question": "q", "answer": NaN}', "line 1 is not JSON: NaN is no JSON"),
    (b'{"question": -Infinity, "answer": "1"}', "line 1 is not JSON: -Infinity is no JSON"),
    (b"[" * 100_000, "line 1 is not JSON"),
    (b'{"question": "q"', "line 1 is not JSON"),
]


@pytest.mark.parametrize(("data", "message"), BAD_LINES)
def test_lines_that_cannot_be_read(flags, tmp_path, capsys, data, message):
    path = tmp_path / "items.jsonl"
    path.write_bytes(data)
    assert train.main(flags(task=path, eval_size=None)) == 2
    one_line(capsys, path, message.replace("PATH", str(path)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "data",
    [ITEM.encode(), gzip.compress(ITEM.encode() * 9, mtime=0)[:-9], gzip.compress(b"x", mtime=0)[:12] + b"z" * 9],
)
def test_gzip_that_is_none(flags, tmp_path, capsys, data):
    path = tmp_path / "items.jsonl.gz"
    path.write_bytes(data)
    assert train.main(flags(task=path)) == 2
    one_line(capsys, path, "is not a whole gzip file")


def test_surrogate_pairs_are_characters(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "\\ud83d\\ude00", "answer": "\\u0000"}')
    assert read(tmp_path / "a.jsonl", name="task") == [{"question": "\N{GRINNING FACE}", "answer": "\0"}]


@pytest.mark.parametrize("argument", ["task", "prompts", "topology", "eval_file"])
def test_a_folder_where_a_file_is_wanted(flags, tmp_path, capsys, argument):
    path = tmp_path / ("given.yaml" if argument in ("prompts", "topology") else "given.jsonl")
    path.mkdir()
    (tmp_path / "items.jsonl").write_text(ITEM * 9)
    changes = {"task": tmp_path / "items.jsonl"} if argument == "eval_file" else {}
    assert train.main(flags(**changes, **{argument: path})) == 2
    one_line(capsys, argument, path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("question,answer\nä,1\n".encode("latin-1"), "is not UTF-8 (byte 0xe4 in line 2)"),
        (b"question,answer\nq,1,2\n", "line 2 is not CSV: more than the 2 cells of the first line"),
        (b'question,answer\n"q,1\n', "is not CSV: unexpected end of data"),
        (b"question,answer\n", "is empty"),
    ],
)
def test_csv_that_cannot_be_read(tmp_path, data, message):
    (tmp_path / "test.csv").write_bytes(data)
    with pytest.raises(ValueError) as raised:
        Source("hub", "test", ("test",)).rows(str(tmp_path), "t")
    assert str(tmp_path / "test.csv") in str(raised.value) and message in str(raised.value)


def test_a_long_cell_is_read(tmp_path):
    (tmp_path / "test.csv").write_text("question,answer\n" + "q" * 200_000 + ",1\n")
    assert len(Source("hub", "test", ("test",)).rows(str(tmp_path), "t")[0]["question"]) == 200_000


def test_parquet_that_is_none(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "test.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match="test.parquet cannot be read"):
        Source("hub", "test", ("test",)).rows(str(tmp_path), "t")


def test_prompts_with_half_a_character(flags, tmp_path, capsys):
    (tmp_path / "given.yaml").write_text('roles: {default: {user: "{question} \\ud800"}}')
    assert train.main(flags(prompts=tmp_path / "given.yaml")) == 2
    one_line(capsys, "prompts", tmp_path / "given.yaml", "half a surrogate pair")


TWICE = {
    "prompts": "roles:\n  default: {user: '{question}'}\n  default: {user: '{question}!'}\n",
    "topology": "name: t\nagents: [{name: a}]\nagents: [{name: b}]\n",
    "config": "max_steps: 1\nmax_steps: 2\n",
}


@pytest.mark.parametrize("argument", TWICE)
def test_a_name_given_twice_in_yaml(flags, tmp_path, capsys, argument):
    path = tmp_path / "given.yaml"
    path.write_text(TWICE[argument])
    try:
        assert train.main(flags(**{argument: path})) == 2
    except SystemExit as left:
        assert left.code == 2
    one_line(capsys, path, "is there more than once")


def test_how_many_items_are_held_out_of_a_file(tmp_path):
    """A tenth, and not as many as the preset of another task says."""
    (tmp_path / "items.jsonl").write_text('{"question": "q", "answer": "1"}\n' * 30)
    args = parse_training([f"--task={tmp_path / 'items.jsonl'}"])[1]
    assert args.eval_size is None and parse_training([])[1].eval_size == 1024
    assert len(load_task(args).eval) == 3


DESCRIPTIONS = [
    ("", "system.json cannot be read: Expecting value"),
    ('{"system": {', "system.json cannot be read: Expecting property name"),
    ("{}", "system.json has no system, topology, task, decoding; allowed: the file that diffmas.train wrote"),
    ("[]", "system.json has list in it"),
    ('{"system": {}, "topology": {}, "task": 3, "decoding": {}}', "system.json has no task"),
    (
        '{"system": {}, "topology": {}, "task": {}, "decoding": {}}',
        "system.json does not say its model_name_or_path and task",
    ),
    (
        '{"system": {"model_name_or_path": null}, "topology": {}, "task": {"task": "relay"}, "decoding": {}}',
        "agents is missing",
    ),
    ("\udcff", "system.json is not UTF-8 (byte 0xff in line 1)"),
]


@pytest.mark.parametrize(("content", "message"), DESCRIPTIONS)
def test_a_description_that_is_none(copy, capsys, content, message):
    (copy / "system.json").write_bytes(content.encode(errors="surrogateescape"))
    assert evaluate.main([f"--run={copy}"]) == 2
    one_line(capsys, message)
    assert chat.main([f"--run={copy}", "--once", "x"]) == 2
    one_line(capsys, message)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "alignment.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("size", [0, 7, 100])
def test_weights_that_are_cut_off(copy, capsys, name, size):
    (copy / name).write_bytes((copy / name).read_bytes()[:size])
    assert evaluate.main([f"--run={copy}"]) == 2
    one_line(capsys, copy, "cannot be read")


def test_weights_that_are_not_there(copy, capsys):
    (copy / "alignment.safetensors").unlink()
    assert evaluate.main([f"--run={copy}"]) == 2
    one_line(capsys, f"run {copy} has no alignment.safetensors")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_model_that_is_cut_off(flags, base, tmp_path, capsys, name):
    folder = shutil.copytree(base, tmp_path / "model")
    (folder / name).write_bytes((folder / name).read_bytes()[:200])
    assert train.main(flags(model=folder)) == 2
    one_line(capsys, folder)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("inside", ["", "deeper/run"])
def test_results_where_there_is_a_file(flags, copy, tmp_path, capsys, inside):
    (tmp_path / "taken").write_text("")
    where = tmp_path / "taken" / inside
    assert train.main(flags(output_dir=where)) == 2
    one_line(capsys, "output_dir", tmp_path / "taken", "is a file; allowed: a folder")
    assert evaluate.main([f"--run={copy}", f"--output_dir={where}"]) == 2
    one_line(capsys, "output_dir", "is a file")
    assert ablate.main([f"--run={where}", "--latent_steps=0,1"]) == 2
    one_line(capsys, "run", "is a file")
    assert evaluate.main([f"--run={where}", "--methods=single"]) == 2
    one_line(capsys, "run", "is a file")


def test_results_where_nothing_can_be_written(flags, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert train.main(flags()) == 2
    one_line(capsys, "output_dir", "cannot be written to")


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def torn(*args, **kwargs):
    raise RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file data/0")


@pytest.mark.parametrize(
    ("place", "name", "fails", "named"),
    [
        (session, "write_records", full, "No space left"),
        (os, "fsync", full, "prompts.yaml cannot be written"),
        (weights, "save_file", torn, "alignment.safetensors cannot be written"),
        (torch, "save", torn, "checkpoint-1 cannot be written"),
    ],
)
def test_a_full_disk(flags, capsys, monkeypatch, tmp_path, place, name, fails, named):
    monkeypatch.setattr(place, name, fails)
    assert train.main(flags(alignment="learned", max_steps=1, save_steps=1, eval_size=2)) == 2
    one_line(capsys, named)


def test_nothing_is_half_written(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_atomically(path, "before")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="summary.json cannot be written"):
        write_atomically(path, "after")
    assert path.read_text() == "before" and [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def interrupted(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (session, "load_task"), (session, "build_system"), (session, "length_bound"), (session, "Evaluator"),
        (SystemTrainer, "training_step"), (MultiAgentSystem, "generate"), (session, "write_report"),
    ],
)  # fmt: skip
def test_ctrl_c_in_a_training(flags, capsys, monkeypatch, place, name):
    monkeypatch.setattr(place, name, interrupted)
    assert train.main(flags(max_steps=1, eval_size=2)) == 130
    error = capsys.readouterr().err
    assert error.endswith("python -m diffmas.train: interrupted\n") and "Traceback" not in error


def test_ctrl_c_elsewhere(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Comparison, "__init__", interrupted)
    for module, flags in (
        (evaluate, [f"--run={tmp_path / 'new'}", "--methods=single"]),
        (ablate, [f"--run={tmp_path / 'new'}", "--latent_steps=0,1"]),
    ):
        assert module.main(flags) == 130 and capsys.readouterr().err.endswith("interrupted\n")
    monkeypatch.setattr(weights.PeftModel, "from_pretrained", interrupted)
    for module in (evaluate, chat):
        assert module.main([f"--run={run}"]) == 130 and capsys.readouterr().err.endswith("interrupted\n")


@pytest.mark.parametrize("program", ["train", "chat"])
def test_ctrl_c_while_starting(program):
    process = subprocess.Popen(
        [sys.executable, "-m", f"diffmas.{program}", "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    # Torch is being imported: the seconds in which most people press the key.
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, f"\npython -m diffmas.{program}: interrupted\n")


REFUSING = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}x"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (REFUSING, "the model's chat template refuses the prompt of role sender: System role not supported"),
        ("{% if %}", "the model's chat template refuses the prompt of role sender"),
        ("{{ messages[0].nothing.at_all }}", "the model's chat template refuses the prompt of role sender"),
    ],
)
def test_a_template_that_raises(flags, base, tmp_path, capsys, template, message):
    folder = shutil.copytree(base, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    (tmp_path / "roles.yaml").write_text("roles: {default: {system: You add., user: '{evidence} {question}'}}")
    assert train.main(flags(model=folder, prompts=tmp_path / "roles.yaml")) == 2
    one_line(capsys, message)
    assert not (tmp_path / "run").exists()


def test_what_is_no_user_error_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="shapes"):
        failures.run_program("p", lambda: exec("raise RuntimeError('shapes do not fit')"), lower="nothing")


def test_chat_refuses_half_a_character(run, capsys):
    assert chat.main([f"--run={run}", "--once", "evidence=\udcff", "question=b"]) == 2
    one_line(capsys, "evidence of what was asked has byte 0xff at character 1, no UTF-8")
