"""Models that think or do not, as asked: one agent in both modes, a longer budget, how many answers were cut."""

import json
from dataclasses import replace

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from diffmas import eval as evaluate
from diffmas import train
from diffmas.comparison.comparison import ITEMS_FILE
from diffmas.evaluation.records import read_records
from diffmas.loading import load_run
from diffmas.runs.files import RECORDS_FILE
from diffmas.system import MultiAgentSystem

SWITCH = (
    "{%- if add_generation_prompt and enable_thinking is defined and enable_thinking is false %}"
    "{{- 'No thought. ' }}{%- endif %}"
)


@pytest.fixture(scope="module")
def thinker(base, tmp_path_factory):
    """The tiny base with a template that can be told not to think."""
    folder = tmp_path_factory.mktemp("thinker")
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template += SWITCH
    tokenizer.save_pretrained(folder)
    return str(folder)


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


@pytest.mark.parametrize("off", [False, True])
def test_one_agent_is_evaluated_in_the_other_mode_too(thinker, flags, tmp_path, off, capsys):
    text = '{"enable_thinking": false}' if off else None
    given = flags(model=thinker, max_steps=1, eval_size=4, chat_template_kwargs=text)
    assert train.main(given) == 0
    run, other = tmp_path / "run", "single_thinking" if off else "single_no_thinking"
    found = summary(run)
    assert {k for k in found if k.startswith("accuracy_single")} == {"accuracy_single", f"accuracy_{other}"}
    assert found["cut_by_length"].keys() == {"matched", "mismatched", "zero", "noise", "training_free", "single", other}
    assert "not thinking" in capsys.readouterr().out or off
    records = [json.loads(line) for line in (run / RECORDS_FILE).read_text().splitlines()]
    for variant in ("matched", "single", other):
        prompts = [r["prompt"].endswith("No thought. ") for r in records if r["variant"] == variant]
        assert prompts == [off if variant != other else not off] * 4
    for variant, share in found["cut_by_length"].items():
        cut = [r["finish"] == "length" for r in records if r["variant"] == variant]
        assert share == sum(cut) / len(cut)
    report = (run / "report.html").read_text()
    assert "cut by length" in report and ("one agent without the adapter, thinking" in report) == off
    # The run keeps what it was told.
    assert load_run(run).system.prompts.chat_template_kwargs == ({"enable_thinking": False} if off else {})
    copy = tmp_path / "copy"
    MultiAgentSystem.from_pretrained(run).save_pretrained(copy)
    kept, own = MultiAgentSystem.from_pretrained(copy).prompts, load_run(run).system.prompts
    assert replace(kept, source=own.source) == own
    assert evaluate.main([f"--run={run}", "--variants=single_thinking,single_no_thinking", "--disable_tqdm=true"]) == 0
    assert {"accuracy_single_thinking", "accuracy_single_no_thinking"} <= summary(run / "eval").keys()


def test_methods_in_both_modes(thinker, team_flags, tmp_path, capsys):
    run = tmp_path / "methods"
    given = [f for f in team_flags(model=thinker, temperature=0, max_new_tokens=None) if not f.startswith("--max_new")]
    (tmp_path / "long.yaml").write_text(yaml.safe_dump({"max_new_tokens": 3}))
    methods = "--methods=single,single+thinking,single+no_thinking"
    assert evaluate.main([*given, f"--config={tmp_path / 'long.yaml'}", f"--run={run}", methods]) == 0
    records = read_records(run / ITEMS_FILE)
    ends = {}
    for r in records:
        ends.setdefault(r.method, set()).add(r.prompt.endswith("No thought. "))
    assert ends == {"single": {False}, "single+thinking": {False}, "single+no_thinking": {True}}
    cells = {c["method"]: c for c in summary(run)["cells"]}
    for method, cell in cells.items():
        cut = [r.finish == "length" for r in records if r.method == method]
        assert cell["cut"] == pytest.approx(sum(cut) / len(cut)) and cell["cut"] > 0
    assert "cut" in capsys.readouterr().out and " cut" in (run / "report.html").read_text()


def test_modes_need_a_switch(flags, team_flags, tmp_path, capsys):
    assert train.main(flags(max_steps=1, disable_final_eval=True)) == 0
    capsys.readouterr()
    for given in (
        [f"--run={tmp_path / 'run'}", "--variants=single_thinking"],
        [*team_flags(), f"--run={tmp_path / 'm'}", "--methods=single+thinking"],
    ):
        assert evaluate.main(given) == 2
        assert "chat template has no switch for thinking; allowed: one that reads enable_thinking or thinking" in (
            capsys.readouterr().err
        )


@pytest.mark.parametrize(("off", "longest"), [(False, 32_768), (True, 2_048)])
def test_the_longest_answer_of_a_model_that_thinks(thinker, flags, tmp_path, off, longest):
    kwargs = {"enable_thinking": False} if off else None
    text = kwargs and json.dumps(kwargs)
    # The paper's preset, which every model of its own takes, says nothing about it.
    given = [f for f in flags(model=thinker, disable_final_eval=True, chat_template_kwargs=text, max_steps=1)
             if not f.startswith("--max_new_tokens")]  # fmt: skip
    assert train.main(given) == 0
    assert json.loads((tmp_path / "run" / "system.json").read_text())["decoding"]["max_new_tokens"] == longest
    system = MultiAgentSystem.from_pretrained(tmp_path / "run")
    assert system.decoding.max_new_tokens == longest
    again = MultiAgentSystem(thinker, "single", prompts=system.prompts)
    assert again.decoding.max_new_tokens == longest
