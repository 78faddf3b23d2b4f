"""The chat program: what it asks for, what it shows, how it is left."""

import fcntl
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time

import pytest

from diffmas import chat
from diffmas.loading import build_system
from diffmas.runs.description import describe
from diffmas.runs.files import SYSTEM_FILE
from diffmas.runs.settings import SystemArguments
from diffmas.runs.weights import save_weights
from diffmas.tasks import TaskArguments, load_task

ITEM = load_task(TaskArguments("relay:slots=3")).eval[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A relay system on the embedded base, as training leaves it."""
    folder = tmp_path_factory.mktemp("run")
    args = SystemArguments(topology="relay", latent_steps=2)
    system, _ = build_system(args)
    save_weights(system, folder)
    decoding = dict(max_new_tokens=5, temperature=0.0, top_p=1.0)
    (folder / SYSTEM_FILE).write_text(json.dumps(describe(system, args, TaskArguments("relay:slots=3"), decoding)))
    return str(folder)


def words(item=ITEM):
    return [f"{name}={item[name]}" for name in ("evidence", "question")]


def test_one_agent_answers(capsys):
    assert chat.main(["--topology=single", "--once", *words()]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"single: {ITEM['answer']}\n")
    assert "Where the answer looked" in out and "100.0%" in out
    assert "Latent steps" not in out


def test_a_run_shows_what_its_agents_contributed(run, capsys):
    assert chat.main(["--run", run, "--once", *words()]) == 0
    out = capsys.readouterr().out
    assert out.startswith("solver: ")
    looked, steps = out.split("Latent steps as tokens")
    assert [line.split("│")[2].strip() for line in looked.splitlines() if line.startswith("│")][:2] == [
        "latent steps",
        "prompt",
    ]
    assert "%" in steps and steps.count("│ sender") == 1
    assert chat.main(["--run", run, "--once", *words(), "--no_inspection"]) == 0
    assert capsys.readouterr().out.splitlines() == out.splitlines()[:1]


def test_a_plain_question_fills_the_field_that_is_left(run, capsys):
    question = ITEM["question"].split()
    assert chat.main(["--run", run, "--no_inspection", "--once", words()[0], *question]) == 0
    plain = capsys.readouterr().out
    assert chat.main(["--run", run, "--no_inspection", "--once", *words()]) == 0
    assert capsys.readouterr().out == plain


def test_a_conversation(monkeypatch, capsys):
    lines = iter(["", ITEM["evidence"], f"question = {ITEM['question']}", words()[1], ITEM["evidence"]])
    asked = []

    def read(prompt):
        asked.append(prompt.strip())
        if (line := next(lines, None)) is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", read)
    assert chat.main(["--topology=single", "--no_inspection"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "single: single; 10 latent steps each, hand-over full."
    assert out.count(f"single: {ITEM['answer']}\n") == 2
    assert asked == ["evidence>", "evidence>", "question>", "evidence>", "evidence>", "evidence>"]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--run", "nowhere"], "run nowhere has no system.json"),
        (
            ["--run", "nowhere", "--topology", "single"],
            "topology is 'single' beside run 'nowhere'; allowed: one of the two",
        ),
        (["--topology", "ring"], "topology is 'ring'; allowed: sequential"),
        (["--latent_steps", "-1"], "latent_steps is -1; allowed: integers ≥ 0"),
        (["--prompts", "nowhere.yaml"], "prompts is 'nowhere.yaml': no such file"),
        (["--temperature", "-1"], "temperature is -1.0; allowed"),
        (["--once", "Recall A"], "once has 'Recall A'; allowed: evidence=… question=…"),
        (["--once", "evidence=A1", "color=red", "question=Recall A"], "once has evidence, question, 'color=red'"),
    ],
)
def test_bad_input(argv, message, capsys):
    assert chat.main(argv) == 2
    error = capsys.readouterr().err
    assert f"python -m diffmas.chat: error: {message}" in error and "Traceback" not in error


def test_latent_steps_are_the_run_s_own(run, capsys):
    assert chat.main(["--run", run, "--latent_steps=4", "--once", *words()]) == 2
    assert f"latent_steps is 4 beside run '{run}'" in capsys.readouterr().err


def test_unknown_flag(capsys):
    with pytest.raises(SystemExit) as caught:
        chat.main(["--modle", "m"])
    assert caught.value.code == 2 and "did you mean --model?" in capsys.readouterr().err


def _terminal_session():
    """The child owns its terminal and hears Ctrl-C, also where the tests run in a background that ignores it."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_in_a_terminal():
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "diffmas.chat", "--topology=single", "--no_inspection"],
        stdin=follower, stdout=follower, stderr=follower, env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True, preexec_fn=_terminal_session,
    )  # fmt: skip
    os.close(follower)
    try:
        seen = _read_until(leader, "evidence> ")
        os.write(leader, f"{ITEM['evidence']}\n{ITEM['question']}\n".encode())
        seen += _read_until(leader, f"single: {ITEM['answer']}")
        seen += _read_until(leader, "evidence> ")
        closed = False
        while not closed:
            # A key pressed between the prompt and the read behind it is noted by Python, which goes on waiting.
            time.sleep(0.5)
            os.write(leader, b"\x03")
            said, closed = _read_until_quiet(leader, 20)
            assert "^C" in said
            seen += said
        assert process.wait(30) == 130
        assert "Traceback" not in seen
    finally:
        process.kill()
        os.close(leader)


def _read_until(descriptor, text):
    """What the terminal shows until `text` appears."""
    seen = ""
    while text not in seen:
        ready, _, _ = select.select([descriptor], [], [], 60)
        assert ready, f"no {text!r} in {seen!r}"
        seen += os.read(descriptor, 1024).decode(errors="replace")
    return seen


def _read_until_quiet(descriptor, seconds):
    """What the terminal shows until nothing comes for `seconds`, and whether the program has closed it.

    A terminal that is not read from keeps its process from ending.
    """
    seen = ""
    while select.select([descriptor], [], [], seconds)[0]:
        try:
            seen += os.read(descriptor, 1024).decode(errors="replace")
        except OSError:
            return seen, True
    return seen, False
