"""Sweeps: which agents stay, one training a value, going on, and what is refused."""

import json
import re

import pytest

from diffmas import ablate
from diffmas.agents.topology import TOPOLOGIES, TopologyError
from diffmas.comparison.ablation_report import write_ablation_report
from diffmas.comparison.axes import first_agents


@pytest.mark.parametrize(
    ("topology", "count", "senders"),
    [
        ("sequential", 4, {"planner": (), "critic": ("planner",), "refiner": ("critic",), "solver": ("refiner",)}),
        ("sequential", 2, {"planner": (), "solver": ("planner",)}),
        ("sequential", 1, {"solver": ()}),
        ("hierarchical", 3, {"math_expert": (), "science_expert": (), "summarizer": ("math_expert", "science_expert")}),
    ],
)
def test_first_agents(topology, count, senders):
    assert {a.name: a.senders for a in first_agents(TOPOLOGIES[topology], count).agents} == senders


def test_sweep_trains_every_value_once_and_goes_on(flags, tmp_path, capsys):
    given = [f for f in flags() if not f.startswith("--latent_steps")]
    command = [*given, f"--run={tmp_path / 'out'}", "--latent_steps=0,1", "--agents=1,3", "--disable_tqdm=true"]
    assert ablate.main(command) == 0
    trained = sorted(p.parent.name for p in (tmp_path / "out").glob("training/relay/*/seed-0"))
    assert trained == ["agents=1", "agents=3", "latent_steps=0", "latent_steps=1"]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    steps = {(c["method"], c["control"]): c["latent_steps"] for c in summary["cells"]}
    assert [steps[f"latent_steps={m}", "matched"] for m in (0, 1)] == [0, 2]
    assert ("agents=1", "mismatched") not in steps and steps["agents=3", "mismatched"] == 2 * 10
    report = (tmp_path / "out" / "report.html").read_text()
    assert "<svg" in report and "latent_steps 1" in report and "agents 3" in report
    before = (tmp_path / "out" / "items.jsonl").read_bytes()
    assert ablate.main(command) == 0
    assert (tmp_path / "out" / "items.jsonl").read_bytes() == before


def test_the_report_escapes_names(tmp_path):
    summary = {"cells": [], "settings": {"task": "<u>&"}}
    text = write_ablation_report(tmp_path, summary, "a <b>& c", {"alignment": ["<i>"]}).read_text()
    assert "<h1>a &lt;b&gt;&amp; c: one" in text and "alignment &lt;i&gt;" in text and "&lt;u&gt;&amp;" in text
    assert not {"<b>", "<i>", "<u>"} & set(re.findall("<[a-z]+>", text))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "no axis has several values"),
        (["--latent_steps=4"], "no axis has several values"),
        (["--latent_steps=4,x"], "latent_steps is '4,x'"),
        (["--lora_r=4,4"], "lora_r is '4,4'; allowed: different values"),
        (["--detach_trace=yes,no"], "detach_trace is 'yes,no'"),
        (["--handover=full,half"], "handover is 'half'"),
        (["--agents=1,9"], "agents is 9; allowed: 1 to 2"),
        (["--alignment=identity,rigde"], "alignment has ['rigde']; allowed: identity, ridge, learned"),
        (["--latent_steps=0,1", "--seed=3"], "--seed is given; allowed: --seeds"),
    ],
)
def test_bad_sweeps_are_named(tmp_path, capsys, given, message):
    try:
        assert ablate.main([f"--run={tmp_path / 'out'}", *given]) == 2
    except TopologyError as error:
        pytest.fail(f"not reported: {error}")
    assert message in capsys.readouterr().err
