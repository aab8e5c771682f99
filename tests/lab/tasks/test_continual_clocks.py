"""Statistics of the clocks: planted effects are found, their absence is not mistaken for one."""

import math

import numpy as np
import pytest

from nested_lm_lab.tasks.continual import clocks
from nested_lm_lab.tasks.continual.clocks import RetentionCurve

PLACES, PERIOD, BLOCKS = 64, 8, 4


def places():
    tokens = np.arange(1, PLACES * BLOCKS + 1) * 100
    return clocks.ticks(tokens, 100 * PERIOD), np.repeat(np.arange(BLOCKS), PLACES)


def smooth_noise(rng):
    """Changes with a trend and neighbours that resemble each other."""
    noise = rng.normal(size=PLACES * BLOCKS + 8)
    return np.convolve(noise, np.ones(4) / 4, mode="valid")[: PLACES * BLOCKS] + np.linspace(0, 3, PLACES * BLOCKS)


def study(changes, is_tick, blocks, **options):
    return clocks.event_study(changes, is_tick, blocks, **{"spacing": PERIOD, "permutations": 999, "seed": 0} | options)


class TestEventStudy:
    def test_a_planted_effect_is_found(self):
        is_tick, blocks = places()
        changes = smooth_noise(np.random.default_rng(1)) + np.where(is_tick, 0.8, 0.0)
        found = study(changes, is_tick, blocks)
        assert found.value == pytest.approx(0.8, abs=0.3)
        assert found.p_value <= 0.005
        assert (found.ticks, found.others) == (28, 196)  # half a period at either end of a block is context
        assert (found.shifts, found.tried, found.is_exact) == (8**4, 999, False)  # 7 periods a block: one stretch

    def test_its_absence_is_called_an_effect_no_more_often_than_the_level_says(self):
        is_tick, blocks = places()
        p_values = np.array(
            [study(smooth_noise(np.random.default_rng(s)), is_tick, blocks).p_value for s in range(200)]
        )
        assert (p_values <= 0.05).mean() <= 0.09  # 10 of 200 expected; 18 is 2.6 standard deviations above
        assert (p_values <= 0.5).mean() == pytest.approx(0.5, abs=0.12)

    def test_by_hand_with_all_shifts(self):
        changes = np.array([9.0, 0.0, 3.0, 0.0, 0.0, 3.0, 0.0, 9.0])
        is_tick = np.array([False, False, True, False, False, True, False, False])
        found = study(changes, is_tick, np.zeros(8, dtype=int), spacing=3)
        # Means of three: 4, 1, 1, 1, 1, 4; without them -4, 2, -1, -1, 2, -4, ticks at the second and fifth.
        assert found.value == pytest.approx(2.0 - (-2.5))
        # Shifted by one: -1, -4 against 2, -1, 2, -4 is -2.25; by two the same: none is as extreme.
        assert (found.ticks, found.others, found.shifts, found.is_exact) == (2, 4, 3, True)
        assert found.p_value == found.smallest_p == pytest.approx(1 / 3)

    def test_a_trend_is_no_effect(self):
        is_tick, blocks = places()
        found = study(np.linspace(0, 100, len(blocks)), is_tick, blocks)
        assert found.value == pytest.approx(0.0, abs=1e-9)

    def test_one_stretch_cannot_show_more_than_its_period_allows(self):
        is_tick = np.arange(4 * PERIOD + 2 * (PERIOD // 2)) % PERIOD == 0
        found = study(np.where(is_tick, 100.0, 0.0), is_tick, np.zeros(len(is_tick), dtype=int))
        assert (found.shifts, found.ticks) == (PERIOD, 4)
        assert found.p_value == found.smallest_p == 1 / PERIOD

    def test_a_long_block_is_shifted_in_stretches_of_four_periods_or_more(self):
        is_tick, _ = places()
        found = study(np.where(is_tick, 100.0, 0.0), is_tick, np.zeros(len(is_tick), dtype=int))
        assert found.ticks == PLACES * BLOCKS // PERIOD - 1
        assert found.shifts == PERIOD ** (found.ticks // 4)
        assert found.p_value == found.smallest_p == 1 / 1000

    def test_ticks_at_every_second_place_are_as_extreme_as_the_others(self):
        is_tick = np.arange(10) % 2 == 0
        found = study(np.where(is_tick, 1.0, 0.0), is_tick, np.zeros(10, dtype=int), spacing=2)
        assert found.p_value == found.smallest_p == 1.0  # two shifts, both of size one

    def test_blocks_shorter_than_two_periods_show_nothing(self):
        short = np.arange(15)
        assert study(np.ones(15), short % 8 == 7, np.zeros(15, dtype=int)) is None
        both = np.concatenate([np.zeros(15), np.where(np.arange(24) % 8 == 7, 1.0, 0.0)])
        is_tick = np.concatenate([short % 8 == 7, np.arange(24) % 8 == 7])
        found = study(both, is_tick, np.repeat([0, 1], [15, 24]))
        assert (found.value, found.ticks, found.others) == (1.0, 2, 14)


def test_age_counts_ticks_since_the_segment_ended():
    assert clocks.age_in_ticks(1000, 250, 100) == 8
    assert clocks.age_in_ticks(299, 250, 100) == 0
    assert clocks.age_in_ticks(300, 299, 100) == 1


def test_centre_of_mass_by_hand():
    damage = np.array([[0.0, 1.0, 3.0], [2.0, -5.0, 2.0], [-1.0, 0.0, 0.0]])
    np.testing.assert_allclose(clocks.centre_of_mass(damage), [2.75, 2.0, np.nan])


class TestSpearman:
    def test_by_hand_with_ties(self):
        found = clocks.spearman(np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 2.0, 2.0, 9.0]), permutations=99, seed=0)
        assert found.value == pytest.approx(4.5 / math.sqrt(5 * 4.5))
        # 24 orders; as extreme are those that leave the two ties anywhere in the middle, and their reverse.
        assert found.p_value == pytest.approx(4 / 24)

    def test_a_perfect_order_has_the_smallest_p(self):
        found = clocks.spearman(np.arange(5.0), -(np.arange(5.0) ** 3), permutations=99, seed=0)
        assert found.value == pytest.approx(-1.0)
        assert found.p_value == found.smallest_p == pytest.approx(2 / 120)
        many = clocks.spearman(np.arange(12.0), np.arange(12.0), permutations=99, seed=0)
        assert many.p_value == many.smallest_p == 0.01

    def test_too_little_to_correlate(self):
        assert clocks.spearman(np.arange(2.0), np.arange(2.0), permutations=9, seed=0) is None
        assert clocks.spearman(np.arange(4.0), np.ones(4), permutations=9, seed=0) is None


SCALES = np.geomspace(1e-2, 1e2, 81)


class TestRetention:
    def curves(self, periods, weights, *, noise=0.0):
        rng = np.random.default_rng(0)
        age = np.linspace(100, 40_000, 60)
        lost = clocks.predict_lost(age, periods, 0.5, weights)
        return [
            RetentionCurve(age[: 60 - 10 * i], (lost + noise * rng.normal(size=60))[: 60 - 10 * i]) for i in range(3)
        ]

    def test_curves_that_follow_the_clocks_are_fitted_better_by_them(self):
        periods = (512, 16_384)
        curves = self.curves(periods, (0.3, 1.0), noise=0.005)
        tied = clocks.fit_retention(curves, periods, scales=SCALES)
        free = clocks.fit_retention(curves, (1,), scales=np.geomspace(10, 1e6, 81))
        assert tied.scale == pytest.approx(0.5, rel=0.1)
        np.testing.assert_allclose(tied.weights, [0.3, 1.0], rtol=0.1)
        assert tied.held_out_error < 0.5 * free.held_out_error
        assert len(tied.held_out) == 3
        wrong = clocks.fit_retention(curves, (512, 1024), scales=np.array([0.5]))
        assert wrong.held_out_error > tied.held_out_error

    def test_one_exponential_is_not_fitted_better_by_two(self):
        curves = self.curves((4096,), (1.0,), noise=0.01)
        tied = clocks.fit_retention(curves, (512, 1_048_576), scales=np.array([0.5]))
        free = clocks.fit_retention(curves, (1,), scales=np.geomspace(10, 1e6, 161))
        assert free.held_out_error < tied.held_out_error
        assert free.scale == pytest.approx(2048, rel=0.1)

    def test_weights_are_least_squares_within_their_bounds(self):
        rng = np.random.default_rng(3)
        design = rng.normal(size=(30, 3))
        inside = np.array([0.5, 2.0, 0.1])
        np.testing.assert_allclose(clocks.non_negative_least_squares(design, design @ inside), inside)
        wanted = design @ np.array([1.0, -2.0, 0.5])
        found = clocks.non_negative_least_squares(design, wanted)
        assert (found >= 0).all()
        gradient = design.T @ (design @ found - wanted)
        assert (gradient[found == 0] >= -1e-9).all()  # the conditions of Karush, Kuhn and Tucker
        np.testing.assert_allclose(gradient[found > 0], 0, atol=1e-9)
