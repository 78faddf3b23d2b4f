"""Intervals: coverage on simulated trainings, pairing, repeatability, the ends of the range, what is refused."""

import numpy as np
import pytest

from diffmas.evaluation.statistics import mean_interval, paired_difference

TRIALS = 400


def coverage(draw, truth, **options):
    """Share of simulated experiments whose 95 % interval holds the true mean."""
    generator = np.random.default_rng(7)
    intervals = [mean_interval(draw(generator), resamples=400, seed=i, **options) for i in range(TRIALS)]
    return np.mean([i.low <= truth <= i.high for i in intervals]), np.mean([i.high - i.low for i in intervals])


def bernoulli(generator, difficulty, seed_effect, seeds=3, items=120):
    """Right or wrong, `[seeds, items]`: items differ in difficulty, seeds in how well they were trained."""
    p = 0.5 + difficulty * generator.standard_normal(items) + seed_effect * generator.standard_normal((seeds, 1))
    return (generator.random((seeds, items)) < p).astype(float)


@pytest.mark.parametrize(
    ("difficulty", "seed_effect", "least"), [(0.0, 0.0, 0.95), (0.15, 0.0, 0.95), (0.0, 0.1, 0.9), (0.1, 0.05, 0.9)]
)
def test_coverage_of_the_mean(difficulty, seed_effect, least):
    covered, width = coverage(lambda g: bernoulli(g, difficulty, seed_effect), 0.5)
    # Down to 3 standard errors of a share of 400; a wide interval is allowed, a narrow one is not.
    assert covered >= least - 0.04
    # Half again as wide as with no seeds to account for, at most, where they make no difference.
    assert seed_effect > 0 or width < 1.6 * 2 * 1.96 * (0.25 / 360) ** 0.5


def test_items_alone_would_claim_too_much():
    def by_item_alone(generator):
        return bernoulli(generator, 0.0, 0.1).mean(0)

    assert coverage(by_item_alone, 0.5)[0] < 0.75


def test_one_seed_covers():
    assert 0.917 <= coverage(lambda g: bernoulli(g, 0.1, 0.0, seeds=1), 0.5)[0] <= 0.983


@pytest.mark.parametrize("effect", [0.0, 0.1])
def test_coverage_of_a_paired_difference_and_what_pairing_gains(effect):
    generator = np.random.default_rng(3)
    covered = {"paired": [], "unpaired": []}
    widths = {"paired": [], "unpaired": []}
    for trial in range(TRIALS):
        hard = generator.random(150) < 0.5
        chance = np.where(hard, 0.05, 0.85)
        a, b = ((generator.random((2, 150)) < p).astype(float) for p in (chance + effect, chance))
        order = generator.permutation(150)
        for kind, other in (("paired", b), ("unpaired", b[:, order])):
            interval = paired_difference(a, other, resamples=400, seed=trial)
            covered[kind].append(interval.low <= effect <= interval.high)
            widths[kind].append(interval.high - interval.low)
    assert np.mean(covered["paired"]) >= 0.9
    assert np.mean(widths["paired"]) < 0.8 * np.mean(widths["unpaired"])


def test_same_seed_same_interval():
    outcomes = np.random.default_rng(0).random((3, 50))
    assert mean_interval(outcomes) == mean_interval(outcomes)
    assert mean_interval(outcomes) != mean_interval(outcomes, seed=1)
    assert mean_interval(outcomes).mean == pytest.approx(outcomes.mean())


def test_interval_narrows_with_items_and_widens_with_confidence():
    outcomes = np.random.default_rng(0).random((1, 1600)) < 0.4
    wide, narrow, sure = (
        mean_interval(x, confidence=c) for x, c in ((outcomes[:, :100], 0.95), (outcomes, 0.95), (outcomes, 0.999))
    )
    ratio = (wide.high - wide.low) / (narrow.high - narrow.low)
    assert 3 < ratio < 5.5 and sure.high - sure.low > narrow.high - narrow.low


def test_all_right_is_not_certainty():
    interval = mean_interval(np.ones((1, 40)))
    assert interval.high == 1.0 and interval.low == pytest.approx(0.025 ** (1 / 40))
    none = paired_difference(np.ones(40), np.ones(40))
    assert none.high == -none.low == pytest.approx(1 - 0.025 ** (1 / 40)) and none.mean == 0


def test_a_single_seed_is_paired_with_every_seed():
    a, b = np.random.default_rng(1).random((3, 30)), np.random.default_rng(2).random((1, 30))
    assert paired_difference(a, b) == paired_difference(a, np.repeat(b, 3, 0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_interval(np.zeros((0, 3))), "outcomes has shape"),
        (lambda: mean_interval([0.5, float("nan")]), "all finite"),
        (lambda: mean_interval([1.0], confidence=1.0), "confidence is 1.0"),
        (lambda: mean_interval([1.0], resamples=0), "resamples is 0"),
        (lambda: paired_difference(np.zeros((2, 3)), np.zeros((2, 4))), "the same items"),
        (lambda: paired_difference(np.zeros((2, 3)), np.zeros((3, 3))), "the same seeds or one"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
