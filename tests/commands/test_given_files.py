"""Files a command is given with something wrong in them: named, with what is allowed, before anything is written."""

import json

import pytest

from diffmas import ablate, sandbox, train
from diffmas import eval as evaluate
from diffmas.command_line import parse_training
from diffmas.system import MultiAgentSystem

#: What a file says of an agent.
AGENT = "{name, role, prompt, fields, receives, bridges, chat_template_kwargs, model, adapter}"
PROMPTS = [
    ("roles: [", "is not valid YAML"),
    ("when: 2024-99-99", "is not valid YAML: month must be in 1..12"),
    ("", "holds None; allowed: {roles: {name: {system, user, text}}}"),
    ("sender: {user: x}", "holds ['sender']; allowed: {roles:"),
    ("roles: {sender: x}", "role sender is 'x'; allowed: user, and optionally system and text"),
    ("roles: {sender: {system: x}}", "role sender is {'system': 'x'}; allowed: user"),
    ("roles: {sender: {user: x, usr: y}}", "role sender is {'user': 'x', 'usr': 'y'}; allowed: user"),
    ("roles: {sender: {user: 3}}", "user of role sender is 3; allowed: a text"),
    ("roles: {sender: {user: 'a {'}}", "user of role sender is 'a {' (Single '{' encountered in format string)"),
    ("roles: {default: {user: '{evidense}'}}", "user of role default names the field 'evidense'; allowed: evidence, q"),
    ("roles: {default: {user: x, system: '{}'}}", "system of role default cannot be filled"),
    ("roles: {default: {user: x, text: '{0}'}}", "text of role default cannot be filled"),
    ("roles: {default: {user: '{question.x}'}}", "user of role default cannot be filled"),
    ("roles: {default: {user: '{question:d}'}}", "user of role default cannot be filled"),
    ("roles: {sender: {user: '{question}'}}", "role is 'solver', which has none; allowed: sender"),
]
TOPOLOGIES = [
    ("agents: {", "is not valid YAML"),
    (
        "- a",
        f"agents is missing; allowed: a list of {AGENT}",
    ),
    ("agents: []", "agents is empty"),
    (
        "{1: x, b: y, agents: []}",
        "the topology has unknown keys [1, 'b']; allowed: name, handover, ",
    ),
    (
        "agents: [a]",
        f"agent is 'a'; allowed: {AGENT}",
    ),
    ("agents: [{name: a, 2: b}]", "agent a has unknown keys [2]; allowed: name, role, prompt, fields, receives"),
    ("agents: [{name: a, role: [b]}]", "role of agent a is ['b']; allowed: the name of a role"),
    ("agents: [{name: a, receives: [[b]]}]", "receives of agent a is [['b']]; allowed: a list of names"),
    ("agents: [{name: a, receives: [b]}]", "agent a receives from unknown ['b']; allowed: a"),
    ("{name: 3, agents: [{name: a}]}", "name is 3; allowed: a string"),
    ("{handover: half, agents: [{name: a}]}", "handover is 'half'; allowed: full, latent"),
    ("agents: [{name: writer}]", "role is 'writer', which has none; allowed: sender, solver, single"),
]


@pytest.mark.parametrize(
    ("argument", "content", "message"),
    [("prompts", *case) for case in PROMPTS] + [("topology", *case) for case in TOPOLOGIES],
)
def test_files_of_a_training(flags, tmp_path, capsys, argument, content, message):
    path = tmp_path / "given.yaml"
    path.write_text(content)
    assert train.main(flags(**{argument: path})) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("error:") == 1 and not (tmp_path / "run").exists()
    assert str(path) in error or "relay.yaml" in error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("latent_steps: [1]", "config CONFIG: latent_steps is [1]; allowed: one value"),
        ("topology: {a: 1}", "config CONFIG: topology is {'a': 1}; allowed: one value"),
        ("latent_steps: 1.5", "invalid int value: '1.5'"),
        ("latent_steps: yes", "invalid int value: 'True'"),
        ("{1: x, b: y}", "config CONFIG has unknown arguments ['1', 'b']; allowed"),
        ("latent_steps: many", "invalid int value: 'many'"),
        ("use_cpu: maybe", "argument --use_cpu/--use-cpu: Truthy value expected: got maybe"),
        ("- latent_steps", "config CONFIG has no mapping of arguments; allowed: the arguments that --help lists"),
        ("latent_steps: {", "config CONFIG is not valid YAML"),
    ],
)
def test_a_config_file(tmp_path, capsys, content, message):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(SystemExit) as stop:
        train.main([f"--config={path}"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message.replace("CONFIG", str(path)) in error and error.count("\n") == 1


def test_a_config_file_s_values_are_those_of_flags(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "{latent_steps: 3, prompts: 3, learning_rate: 1e-3, temperature: 1, logging_steps: 5, use_cpu: true, "
        "lr_scheduler_kwargs: {num_cycles: 2}, lr_scheduler_type: cosine_with_restarts, data_dir: null}"
    )
    system, task, decoding, training = parse_training([f"--config={path}"])
    assert (system.latent_steps, task.prompts, task.data_dir, decoding.temperature) == (3, "3", None, 1.0)
    assert (training.learning_rate, training.logging_steps, training.use_cpu) == (1e-3, 5, True)
    assert training.lr_scheduler_kwargs == {"num_cycles": 2}
    path.write_text("label_names: [a]")
    with pytest.raises(ValueError, match=r"^label_names is \['a'\]"):
        parse_training([f"--config={path}"])


def test_a_file_that_is_no_text(flags, tmp_path, capsys):
    (tmp_path / "given.yaml").write_bytes(b"roles: \xff\xfe")
    for argument in ("prompts", "topology"):
        assert train.main(flags(**{argument: tmp_path / "given.yaml"})) == 2
        assert f"{argument} {tmp_path / 'given.yaml'} is not valid YAML" in capsys.readouterr().err


def test_files_of_a_comparison_and_a_sweep(tmp_path, capsys):
    (tmp_path / "given.yaml").write_text("roles: [")
    given = [f"--run={tmp_path / 'out'}", f"--prompts={tmp_path / 'given.yaml'}"]
    assert evaluate.main([*given, "--methods=single"]) == 2 and "is not valid YAML" in capsys.readouterr().err
    assert ablate.main([*given, "--latent_steps=0,1"]) == 2 and "is not valid YAML" in capsys.readouterr().err


def test_options_of_a_procedural_task(flags, capsys):
    pytest.importorskip("reasoning_gym")
    assert train.main(flags(task="rg:chain_sum:max_terms={")) == 2
    assert "option max_terms is '{'; allowed: a YAML value" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["relay", "sums.jsonl", "rg:chain_sum"])
def test_a_data_folder_that_would_not_be_read(flags, tmp_path, capsys, task):
    assert train.main(flags(task=task, data_dir=tmp_path)) == 2
    error = capsys.readouterr().err
    assert f"data_dir is {str(tmp_path)!r} with task {task!r}, which reads none; allowed: with " in error


def test_without_confinement_nothing_is_generated(flags, tmp_path, capsys, monkeypatch):
    """Programs that cannot be run are an error before the first answer, not after the last one."""
    row = {"task_id": 1, "prompt": "Add one.", "code": "def f(x):\n    return x + 1", "test_list": ["assert f(1) == 2"]}
    for name, more in (("MbppPlus", {"test": "assert f(1) == 2"}), ("train", {"text": "Add one.", "task_id": 2})):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row | more) + "\n")
    changes = dict(task="mbpp+", data_dir=tmp_path, topology="single", handover=None, max_steps=1, train_size=None)

    def refuse(program, *, mode):
        raise sandbox.SandboxError(f"mode {mode} is not there")

    sandbox.best_mode.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(sandbox, "run", refuse)
        patched.setattr(MultiAgentSystem, "generate", lambda *a, **k: pytest.fail("an answer was generated"))
        assert train.main(flags(**changes)) == 2
        assert "programs cannot be confined on this machine" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
        assert evaluate.main([*flags(**changes, output_dir=None), f"--run={tmp_path / 'out'}", "--methods=single"]) == 2
        assert "programs cannot be confined on this machine" in capsys.readouterr().err
        assert train.main(flags(**changes, disable_final_eval=True)) == 0, "training alone runs no program"
        assert evaluate.main([f"--run={tmp_path / 'run'}"]) == 2
        assert "programs cannot be confined on this machine" in capsys.readouterr().err
