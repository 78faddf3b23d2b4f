"""The study of the channel: what is missing is run, once; table and plot come from what is kept."""

import json
from types import SimpleNamespace

import pytest

from benchmarks import channel
from diffmas.agents.topology import load_topology
from diffmas.command_line import parse_training
from diffmas.runs.files import METRICS_FILE, SUMMARY_FILE, SYSTEM_FILE

MACHINE = dict(device="a laptop", threads=2, torch="2", transformers="5")


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Trainings that end at once; their folders in the order they were asked for."""
    asked = []

    def run(command, **options):
        flags = dict(flag.removeprefix("--").split("=", 1) for flag in command[3:])
        asked.append(flags)
        out = tmp_path / flags["output_dir"]
        out.mkdir(parents=True, exist_ok=True)
        facts = int(flags["task"].split("n=")[1].split(":")[0])
        right = 0.9 if flags["alignment"] == "soft" else 0.1
        summary = dict(
            accuracy=right / facts, accuracy_mismatched=0.1, accuracy_zero=0.0, accuracy_noise=0.0, accuracy_text=0.5,
            seconds=90, eval_items=64, steps=int(flags["max_steps"]), machine=MACHINE,
        )  # fmt: skip
        (out / SUMMARY_FILE).write_text(json.dumps(summary))
        (out / METRICS_FILE).write_text('{"step": 5, "loss": 1.5}\n{"step": 10, "loss": 0.5}\n')
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(channel.subprocess, "run", run)
    monkeypatch.setattr(channel, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(channel, "PAGE", tmp_path / "page.md")
    (tmp_path / "results").mkdir()
    (tmp_path / "page.md").write_text(f"before\n{channel.BEGIN}\nold\n{channel.END}\nafter\n")
    return asked


def test_arms_and_seeds_and_what_is_kept(study, tmp_path):
    argv = [f"--folder={tmp_path / 'runs'}", "--arms=soft,identity", "--facts=1,2", "--seeds=2", "--steps=10"]
    channel.main(argv)
    assert [(f["alignment"], f["task"], f["seed"]) for f in study] == [
        (alignment, f"facts:n={n}:places=10", seed)
        for seed in "01" for n in (1, 2) for alignment in ("soft", "identity")
    ]  # fmt: skip
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("before\n") and page.endswith("\nafter\n") and "old" not in page
    soft = channel.ARMS["soft"][0]
    assert f"| 1 | {soft} | 90, 90 | 90 | 10 | 0 | 0 | 50 | 1.5 |" in page and f"| 2 | {soft} | 45, 45 | 45 |" in page
    assert (tmp_path / "results" / "channel.png").stat().st_size > 0
    # Nothing is run twice; what was begun goes on.
    channel.main([*argv[:3], "--facts=2", "--seeds=2"])
    assert len(study) == 8
    begun = tmp_path / "runs" / channel.place("soft", 4, 0)
    begun.mkdir(parents=True)
    (begun / SYSTEM_FILE).write_text("{}")
    channel.main([argv[0], "--arms=soft", "--facts=4", "--seeds=1", "--no-results"])
    assert study[-1]["resume_from_checkpoint"] == str(begun)


@pytest.mark.parametrize("arm", channel.ARMS)
def test_flags_are_those_of_a_training(arm, tmp_path, monkeypatch):
    monkeypatch.chdir(channel.ROOT)
    system, task, _, args = parse_training(channel.flags(arm, 2, 0, 100, tmp_path))
    topology = load_topology(system.topology, system.handover, system.handover_sink)
    assert topology.handover == ("full" if arm == "full" else "latent") and task.task == "facts:n=2:places=10"
    assert args.max_message_tokens == system.latent_steps and args.max_steps == 100


@pytest.mark.parametrize("given, message", [("--arms=none", "arms has"), ("--facts=0", "facts is '0'")])
def test_bad_arguments(given, message, capsys):
    with pytest.raises(SystemExit):
        channel.main([given])
    assert message in capsys.readouterr().err
