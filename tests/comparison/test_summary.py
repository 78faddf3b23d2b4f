"""Numbers from records: accuracies, costs, differences, entropy curves, perplexity, agreement, and the report."""

import json
import math
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from diffmas.comparison.report import markdown_table, print_comparison, write_comparison_report
from diffmas.comparison.stability import agreement, entropy_curve, perplexity
from diffmas.comparison.summary import summarise
from diffmas.evaluation.records import Record
from diffmas.evaluation.statistics import paired_difference
from diffmas.support.machine import machine

ONE = Record(
    "relay", "single", "matched", 0, 0, 0, "p", "1", "1", "1", True, 2, 0, 0, 10, [1.0, 0.5], -1.0, "stop", 0.1
)


def records(method, correct, *, control="matched", task="relay", **fields):
    """`correct[seed][item][sample]`."""
    return [
        replace(
            ONE, task=task, method=method, control=control, seed=seed, index=index, sample=sample, correct=bool(right),
            **fields,
        )
        for seed, items in enumerate(correct)
        for index, samples in enumerate(items)
        for sample, right in enumerate(samples)
    ]  # fmt: skip


SINGLE = [[[1, 0], [0, 0], [1, 1]]]
DIFFMAS = [[[1, 1], [0, 1], [1, 1]], [[1, 1], [1, 1], [0, 1]]]
MISMATCHED = [[[0, 0], [0, 1], [0, 0]], [[0, 0], [0, 0], [0, 1]]]


@pytest.fixture
def summary():
    rows = records("single", SINGLE) + records("diffmas", DIFFMAS, latent_steps=4, prefill_tokens=30, message_tokens=3)
    return summarise(rows + records("diffmas", MISMATCHED, control="mismatched"), ["diffmas", "single"])


def test_cells(summary):
    assert [(c["method"], c["control"], c["seeds"], c["samples"], c["answers"]) for c in summary["cells"]] == [
        ("diffmas", "matched", [0, 1], 2, 12),
        ("diffmas", "mismatched", [0, 1], 2, 12),
        ("single", "matched", [0], 2, 6),
    ]
    first = summary["cells"][0]
    assert first["accuracy"]["mean"] == pytest.approx(10 / 12, abs=1e-5)
    assert (first["answer_tokens"], first["message_tokens"], first["latent_steps"], first["prefill_tokens"]) == (
        4,
        3,
        4,
        30,
    )
    assert first["seconds"] == pytest.approx(0.2)


def test_differences_are_paired_by_item_and_seed(summary):
    by_name = {(d["a"], d["b"], d["b_control"]): d for d in summary["differences"]}
    assert set(by_name) == {("diffmas", "single", "matched"), ("diffmas", "diffmas", "mismatched")}
    d = by_name["diffmas", "single", "matched"]
    expected = paired_difference([[1, 0.5, 1], [1, 1, 0.5]], [0.5, 0, 1])
    assert (d["mean"], d["low"], d["high"]) == tuple(round(x, 5) for x in (expected.mean, expected.low, expected.high))
    assert by_name["diffmas", "diffmas", "mismatched"]["mean"] == pytest.approx(10 / 12 - 2 / 12, abs=1e-5)


def test_only_items_that_every_seed_answered_count():
    rows = records("diffmas", [[[1], [1]], [[0], [1], [1]]])
    cell = summarise(rows, ["diffmas"])["cells"][0]
    assert cell["accuracy"]["mean"] == 0.75 and cell["accuracy"]["items"] == 2


def test_entropy_curve():
    rows = [replace(ONE, entropies=e) for e in ([1.0, 0.0, 2.0], [3.0])]
    curve = entropy_curve(rows)
    assert (curve["position"], curve["mean"], curve["answers"]) == ([0, 1, 2], [2.0, 0.0, 2.0], [2, 1, 1])
    assert (curve["low"][0], curve["high"][0]) == (1.5, 2.5)
    long = entropy_curve([replace(ONE, entropies=[float(i) for i in range(10)])], points=4)
    assert (long["position"], long["mean"]) == ([1.0, 4.0, 7.0, 10.0], [1.0, 4.0, 7.0, 9.0])
    assert entropy_curve([])["mean"] == []


def test_perplexity():
    rows = [replace(ONE, tokens=2, logprob=-math.log(16)), replace(ONE, tokens=1, logprob=-math.log(2))]
    assert perplexity(rows) == {"tokens": round(32 ** (1 / 3), 4), "median": 3.0}
    assert perplexity([]) == {"tokens": None, "median": None}


def test_agreement():
    def item(index, *extracted):
        return [replace(ONE, index=index, sample=i, extracted=e) for i, e in enumerate(extracted)]

    rows = item(0, "1", "1", "2") + item(1, None, None, None) + item(2, "3", "3", "3") + item(3, "1", "2", None)
    assert agreement(rows) == {"counts": [1, 1, 1, 1], "mean": 1.5}
    # An item with a sample missing has no number of agreeing samples.
    assert agreement(rows + item(4, "1", "1"))["counts"] == [1, 1, 1, 1]


class Balance(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.links, self.seen = [], [], set()

    def handle_starttag(self, tag, attributes):
        self.links += [v for k, v in attributes if k in ("src", "href") and v and not v.startswith("#")]
        self.seen.add(tag)
        if tag not in ("meta", "path", "use", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            while self.open.pop() != tag:
                pass


def test_report_needs_no_network_and_shows_every_number(summary, tmp_path):
    text = write_comparison_report(tmp_path, summary | {"machine": machine()}).read_text()
    parser = Balance()
    parser.feed(text)
    assert parser.links == [] and parser.open == []
    assert text.count("<svg") == 2
    for cell in summary["cells"]:
        assert f"{100 * cell['accuracy']['mean']:.1f} [" in text
    assert "diffmas: matched − mismatched" in text and "+66.7 [" in text
    json.dumps(summary, allow_nan=False)


def test_names_are_text_not_markup(tmp_path):
    name = "sums <b>& $x$ [/b]"
    rows = records("single", SINGLE, task=name) + records("<i>m</i>", MISMATCHED, task=name, control="zero")
    summary = summarise(rows + records("<i>m</i>", DIFFMAS, task=name), ["single", "<i>m</i>"])
    summary["machine"] = {"device": "<u>cpu"}
    text = write_comparison_report(tmp_path, summary).read_text()
    print_comparison(summary)
    parser = Balance()
    parser.feed(text)
    assert parser.open == [] and not parser.seen & {"i", "u"}
    assert "<h1>sums &lt;b&gt;&amp; $x$ [/b]: 2 methods</h1>" in text and "&lt;i&gt;m&lt;/i&gt; <code>&lt;i" in text
    assert parser.seen >= {"b", "code"} and "&lt;code" not in text, "our own markup was escaped"


def test_markdown(summary):
    lines = markdown_table(summary).splitlines()
    assert lines[0] == "| accuracy, % | relay |" and lines[2].startswith("| trained trace (`diffmas`) | 83.3 [")
