"""What a report says of an evaluation: whether the trained trace says something of its row."""

import pytest

from diffmas.evaluation.records import Record
from diffmas.evaluation.report import carried, print_accuracies

ITEMS = 40


def records(own, other):
    """`own` and `other` of the items right, with the row's own trace and with another row's."""
    fields = dict(
        task="t", method="trained", seed=0, sample=0, prompt="", answer="", gold="", extracted="", tokens=1,
        message_tokens=0, latent_steps=1, prefill_tokens=1, entropies=[], logprob=0.0, finish="stop", seconds=0.0,
        cut_tokens=0,
    )  # fmt: skip
    return [
        Record(**fields, control=control, index=i, correct=i < right)
        for control, right in (("matched", own), ("mismatched", other))
        for i in range(ITEMS)
    ]


@pytest.mark.parametrize(("own", "other", "learnt"), [(30, 2, True), (3, 3, False), (0, 0, False), (2, 30, False)])
def test_a_trace_that_says_nothing_of_its_row(own, other, learnt, capsys):
    found = carried(records(own, other))
    assert found["mean"] == pytest.approx((own - other) / ITEMS) and (found["low"] > 0) == learnt
    print_accuracies({"carried": found})
    out = " ".join(capsys.readouterr().out.split())
    assert f"less another row's: {100 * found['mean']:+.1f} [" in out
    assert ("no communication was learnt" in out) != learnt


def test_nothing_to_compare():
    assert carried([r for r in records(3, 2) if r.control == "matched"]) is None
    assert carried([]) is None
