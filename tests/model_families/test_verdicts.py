"""How a family's comparisons come to one verdict, and what the page makes of them."""

import json
import sys
from dataclasses import asdict

import pytest

from benchmarks.models import __main__ as command
from benchmarks.models import comparison, configurations, page, walk
from benchmarks.models.comparison import CRASH, EXACT, NO_ORACLE, REFUSED, UNBUILT, UNFINISHED, WRONG, Result
from benchmarks.models.configurations import Unbuilt, causal_lm, configuration, families


@pytest.mark.parametrize(
    "verdicts, expected",
    [
        ([EXACT, EXACT], EXACT),
        ([EXACT, REFUSED], EXACT),
        ([EXACT, UNBUILT], EXACT),
        ([REFUSED, REFUSED], REFUSED),
        ([EXACT, WRONG, CRASH], WRONG),
        ([EXACT, CRASH], CRASH),
        ([EXACT, NO_ORACLE], EXACT),
        ([UNBUILT], UNBUILT),
    ],
)
def test_fold(verdicts, expected):
    errors = {EXACT: 1e-15, WRONG: 0.5}
    results = [Result(str(i), v, errors.get(v), why="" if v in errors else f"why {v}") for i, v in enumerate(verdicts)]
    verdict = walk.fold(results)
    assert verdict.verdict == expected
    assert verdict.error == max((errors[v] for v in verdicts if v in errors), default=None)
    if REFUSED in verdicts:
        assert verdict.why == f"why {REFUSED}"


def crash(*args):
    raise SystemExit(7)


def sleep(*args):
    import time

    time.sleep(60)


@pytest.mark.parametrize("fault, why", [(crash, "ended with code 7"), (sleep, "not done after 0.5 seconds")])
def test_a_family_that_ends_its_process_does_not_end_the_walk(monkeypatch, fault, why):
    monkeypatch.setattr(walk, "check", fault)
    found = dict(walk.walk(["llama", "qwen2"], cases=(), jobs=2, limit=20 if fault is crash else 0.5))
    assert set(found) == {"llama", "qwen2"}
    for layouts in found.values():
        (verdict,) = layouts.values()
        assert verdict.verdict == (CRASH if fault is crash else UNFINISHED) and why in verdict.why


def test_what_differs_from_an_oracle_that_differs_from_itself_says_nothing(monkeypatch):
    monkeypatch.setattr(comparison, "oracle_failures", lambda model: {True: "a prefix changes"})
    monkeypatch.setattr(comparison, "_judge", lambda model, case: Result(str(case), WRONG, 1.0))
    found = {result.case: result.verdict for result in comparison.check("llama", "own", comparison.QUICK)}
    detached = {str(case) for case in comparison.QUICK if case.detach}
    assert found.pop("oracle") == NO_ORACLE and detached
    assert found == {case: NO_ORACLE if case in detached else WRONG for case in map(str, comparison.QUICK)}


def test_every_layer_kind_once_and_windows_short():
    own, full = (configuration("gemma3_text", layout) for layout in ("own", "full"))
    assert own.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    assert full.layer_types == ["full_attention"] * 3 and own.sliding_window == 5
    assert walk.layouts("gemma3_text") == ("full", "own")
    assert walk.layouts("llama") == ("own",)


def test_no_weight_is_a_unit_or_zero():
    for name, parameter in causal_lm("qwen2_moe", "own").named_parameters():
        assert parameter.isfinite().all() and len(parameter.unique()) > parameter.numel() // 2, name


def test_what_cannot_be_built_says_so(monkeypatch):
    monkeypatch.setitem(configurations.TINY, "num_attention_heads", 7)
    with pytest.raises(Unbuilt, match="(configuration|model): .*7"):
        causal_lm("llama", "own")


def test_the_command_keeps_other_results_and_writes_the_page(tmp_path, monkeypatch):
    results, written = tmp_path / "results.json", tmp_path / "models.md"
    kept = {"verdict": WRONG, "error": 0.5, "why": "a | b", "oracle": "", "cases": {}}
    results.write_text(json.dumps({"families": {"smollm3": {"own": kept}}}))
    found = {"own": walk.Verdict(REFUSED, why="no <rotary>")}
    monkeypatch.setattr(command, "walk", lambda chosen, **options: [(name, found) for name in chosen])
    arguments = ["--only", "bert", "--results", str(results), "--write", str(written)]
    monkeypatch.setattr(sys, "argv", ["models", *arguments])
    command.main()
    assert set(json.loads(results.read_text())["families"]) == {"bert", "smollm3"}
    text = written.read_text()
    assert "| `bert` | – | refused | no &lt;rotary>" in text and "| `smollm3` | – | **WRONG** 5e-01 | a \\| b |" in text
    written.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    monkeypatch.setattr(sys, "argv", ["models", "--render-only", *arguments[2:]])
    command.main()
    assert "old" not in written.read_text() and written.read_text().endswith("\nafter\n")


def test_another_version_says_where_it_differs():
    def results(version, **verdicts):
        families = {name: {"own": asdict(walk.Verdict(verdict, why="why"))} for name, verdict in verdicts.items()}
        return {"families": families, "machine": {"transformers": version}}

    text = page.differences(results("2", a=EXACT, b=EXACT, c=EXACT), results("1", a=EXACT, b=CRASH))
    assert text.startswith("transformers 1: 2 families: 1 exact, 1 crash. 1 of the table are not in it.")
    assert "| `b` | **crash** | exact | why |" in text and "`a`" not in text


def test_an_unknown_family_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["models", "--only", "lama"])
    with pytest.raises(SystemExit):
        command.main()
    assert "['lama']; allowed: " in capsys.readouterr().err
    assert "llama" in families()
