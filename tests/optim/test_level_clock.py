"""The level clock."""

import pytest

from nested_lm.optim.level_clock import LevelClock


def test_a_level_is_due_on_multiples_of_its_period():
    clock = LevelClock((4, 8, 32))
    assert [clock.due(tokens) for tokens in (4, 8, 12, 32, 33)] == [(0,), (0, 1), (0,), (0, 1, 2), ()]


def test_periods_that_do_not_nest_are_refused():
    with pytest.raises(ValueError, match="6 is not a multiple of 4"):
        LevelClock((4, 6))
    with pytest.raises(ValueError, match="at least 1 token"):
        LevelClock((0, 6))
