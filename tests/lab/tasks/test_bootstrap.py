import math

import numpy as np
import pytest

from nested_lm.errors import NumericsError
from nested_lm_lab.evaluation.bootstrap import Bootstrap, wilson


def test_ratio_weighs_documents_by_their_bytes():
    interval = Bootstrap(samples=200).ratio(np.array([1.0, 9.0]), np.array([1.0, 3.0]))
    assert interval.value == 2.5  # not the mean of 1 and 3
    assert interval.n == 2
    # Two documents drawn with replacement: (1,1), (1,2) or (2,2), so the ratio is 1, 2.5 or 3.
    assert (interval.low, interval.high) == (1.0, 3.0)


def test_interval_of_a_mean_has_the_width_of_theory():
    values = np.random.default_rng(0).normal(5.0, 2.0, size=400)
    interval = Bootstrap(samples=4000).mean(values)
    half = 1.96 * values.std() / math.sqrt(400)
    assert interval.low == pytest.approx(interval.value - half, abs=0.03)
    assert interval.high == pytest.approx(interval.value + half, abs=0.03)


def test_same_seed_gives_the_same_interval_and_another_seed_another():
    values = np.arange(30.0)
    first, again = (Bootstrap(samples=300).mean(values) for _ in range(2))
    assert first == again
    assert Bootstrap(samples=300, seed=1).mean(values).low != first.low


def test_resampling_in_blocks_draws_what_one_block_draws(monkeypatch):
    values = np.arange(7.0)
    whole = Bootstrap(samples=50).resample(values)[0]
    monkeypatch.setattr("nested_lm_lab.evaluation.bootstrap._MAX_WEIGHTS", 20)
    np.testing.assert_array_equal(Bootstrap(samples=50).resample(values)[0], whole)


def test_pairing_removes_what_documents_have_in_common():
    rng = np.random.default_rng(1)
    hard = rng.uniform(100, 900, size=40)
    size = np.full(40, 200.0)
    boot = Bootstrap(samples=1000)
    paired = boot.paired(hard, hard - 5.0 + rng.normal(0, 1, 40), size)
    assert paired.low > 0
    assert paired.high - paired.low < 0.01
    alone = boot.ratio(hard, size)
    assert alone.high - alone.low > 0.5


def test_one_document_has_no_interval():
    interval = Bootstrap(samples=100).ratio(np.array([3.0]), np.array([2.0]))
    assert (interval.value, interval.low, interval.high, interval.n) == (1.5, None, None, 1)
    assert "one document" in interval.method


def test_scores_that_are_not_finite_are_refused_by_document():
    with pytest.raises(NumericsError, match=r"1 of 3 scores are not finite .*document 1"):
        Bootstrap(samples=100).mean(np.array([1.0, np.nan, 2.0]))


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_agrees_with_published_values(successes, n, low, high):
    interval = wilson(successes, n)
    assert interval.low == pytest.approx(low, abs=1e-4)
    assert interval.high == pytest.approx(high, abs=1e-4)
    assert interval.value == successes / n
