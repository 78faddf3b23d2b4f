"""The studies of single trainings: what is missing is run, once; tables and plots come from what is kept."""

import json
from types import SimpleNamespace

import pytest

from benchmarks import agents, capacity, channel, seeds, trainings
from diffmas.agents.topology import load_topology
from diffmas.command_line import parse_training
from diffmas.runs.files import METRICS_FILE, SUMMARY_FILE, SYSTEM_FILE

MACHINE = dict(device="a laptop", threads=2, torch="2", transformers="5")
MARKS = ("channel", "capacity", "capacity-toy", "seeds", "facts", "models", "adapters")


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Trainings that end at once; their flags in the order they were asked for."""
    asked = []

    def run(command, **options):
        flags = dict(flag.removeprefix("--").split("=", 1) for flag in command[3:])
        asked.append(flags)
        out = tmp_path / flags["output_dir"]
        out.mkdir(parents=True, exist_ok=True)
        right = 0.1 if flags.get("alignment") == "identity" else 0.9 - int(flags["seed"]) / 10
        summary = dict(
            accuracy=right, accuracy_mismatched=0.1, accuracy_zero=0.0, accuracy_noise=0.0, accuracy_text=0.5,
            accuracy_training_free=0.2, accuracy_single=0.7, seconds=90, eval_items=64,
            steps=int(flags.get("max_steps", 240)), machine=MACHINE, system={"topology": str(tmp_path / "team.yaml")},
            training={"seed": int(flags["seed"])},
        )  # fmt: skip
        (out / SUMMARY_FILE).write_text(json.dumps(summary))
        (out / METRICS_FILE).write_text(
            '{"step": 5, "loss": 1.5}\n{"step": 10, "eval_accuracy": 0.25}\n{"step": 15, "eval_accuracy": 0.5}\n'
        )
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(trainings.subprocess, "run", run)
    page = tmp_path / "page.md"
    page.write_text("before\n" + "".join(f"<!-- {m}: begin -->\nold\n<!-- {m}: end -->\n" for m in MARKS) + "after\n")
    for module in (agents, capacity, channel, seeds):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
        monkeypatch.setattr(module, "PAGE", page)
    monkeypatch.setattr(channel, "README", page)
    return asked


def test_arms_and_seeds_and_what_is_kept(study, tmp_path):
    argv = [f"--folder={tmp_path / 'runs'}", "--arms=soft,identity", "--tasks=facts-1,facts-2", "--seeds=2"]
    channel.main(argv)
    assert [(f["alignment"], f["task"], f["seed"]) for f in study] == [
        (alignment, f"facts:n={n}:places=10", seed)
        for seed in "01" for n in (1, 2) for alignment in ("soft", "identity")
    ]  # fmt: skip
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("before\n") and page.endswith("\nafter\n") and page.count("old") == 4
    soft = channel.ARMS["soft"][0]
    assert f"| facts-2 | {soft} | 90, 80 | 85 | 10 | 0 | 0 | 20 | 50 | 70 | 40 | 1.5 |" in page
    assert "| 2 |  |  | 85 (50) |  |  |" in page
    assert "| trained, the row's own trace | 85.0 % (80.0 to 90.0) |" in page
    assert (tmp_path / "results" / "channel.png").stat().st_size > 0
    kept = json.loads((tmp_path / "results" / "soft" / "facts-1" / "seed-0" / SUMMARY_FILE).read_text())
    assert kept["system"]["topology"] == "team.yaml"
    # Nothing is run twice; what was begun goes on.
    channel.main([*argv[:3], "--seeds=2"])
    assert len(study) == 8
    begun = tmp_path / "runs" / "soft" / "facts-4" / "seed-0"
    begun.mkdir(parents=True)
    (begun / SYSTEM_FILE).write_text("{}")
    channel.main([argv[0], "--arms=soft", "--tasks=facts-4", "--seeds=1", "--no-results"])
    assert study[-1]["resume_from_checkpoint"] == str(begun)


def test_seeds(study, tmp_path):
    seeds.main([f"--folder={tmp_path / 'runs'}", "--seeds=3"])
    assert [f.get("latent_steps") for f in study] == [None, "4"] * 3 and {f["seed"] for f in study} == {"0", "1", "2"}
    assert "| default | 3 | 70.0 | 80.0 | 3 | 10.0 | 90 |" in (tmp_path / "page.md").read_text()


def test_capacity(study, tmp_path):
    capacity.main([f"--folder={tmp_path / 'runs'}", "--tasks=slots-2,slots-8", "--arms=m-1,m-4,full"])
    assert [(f["task"], f["latent_steps"], f["handover"]) for f in study] == [
        (f"relay:slots={n}", m, handover)
        for n in (2, 8) for m, handover in (("1", "latent"), ("4", "latent"), ("4", "full"))
    ]  # fmt: skip
    assert "| 8 | 90 (20, 50) | 90 (20, 50) | 90 (20, 50) |" in (tmp_path / "page.md").read_text()
    assert (tmp_path / "results" / "capacity.png").stat().st_size > 0
    assert capacity.known(100, 8) == 8 and capacity.known(capacity.CHANCE, 8) == 0


def test_agents(study, tmp_path):
    agents.main([f"--folder={tmp_path / 'runs'}", "--seeds=2"])
    assert [(f.get("topology"), f.get("adapters"), f["seed"]) for f in study] == [
        ("two_models", None, "42"), ("two_models", None, "0"), (None, "shared", "0"), (None, "shared", "1"),
        (None, "per_role", "0"), (None, "per_role", "1"),
    ]  # fmt: skip
    page = (tmp_path / "page.md").read_text()
    assert "| one adapter of both | 2 | 80.0 | 85.0 | 10.0 | 0 | 0 | 20 | 25, 25 | 240 | 90 |" in page
    assert "Seeds of `--topology two_models`: 0, 42." in page and page.count("old") == len(MARKS) - 2


def of_all_studies():
    yield from (channel.training(arm, "facts-2", 0, 100) for arm in channel.ARMS)
    yield from (channel.training("soft", task, 0, 100) for task in channel.TASKS)
    yield from (capacity.training(arm, "slots-4", 0) for arm in capacity.ARMS)
    yield from (trainings.Training(arm, "relay", 0, seeds.SHARED | given) for arm, (_, given) in seeds.ARMS.items())


@pytest.mark.parametrize("training", [*of_all_studies()], ids=lambda training: f"{training.arm}, {training.task}")
def test_flags_are_those_of_a_training(training, tmp_path, monkeypatch):
    monkeypatch.chdir(channel.ROOT)
    system, task, _, args = parse_training(training.flags(tmp_path))
    topology = load_topology(system.topology, system.handover, system.handover_sink)
    assert topology.handover == ("full" if training.arm == "full" else "latent") and args.seed == 0
    assert task.task == training.options.get("task", "relay:slots=4")
    if training.task != "relay":
        assert args.max_message_tokens == system.latent_steps


@pytest.mark.parametrize(
    "study, given, message",
    [(channel, "--arms=none", "arms has"), (channel, "--tasks=0", "tasks has"), (capacity, "--tasks=a", "tasks has")],
)
def test_bad_arguments(study, given, message, capsys):
    with pytest.raises(SystemExit):
        study.main([given])
    assert message in capsys.readouterr().err
