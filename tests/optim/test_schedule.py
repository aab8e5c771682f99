import math

import pytest

from nested_lm.config.train import Cosine, WarmupStableDecay
from nested_lm.optim.schedule import rate_multiplier

COSINE = Cosine(kind="cosine", warmup_tokens=100, final=0.1)
WSD = WarmupStableDecay(kind="wsd", warmup_tokens=100, decay_tokens=400, final=0.0)


@pytest.mark.parametrize(
    ("schedule", "tokens", "expected"),
    [
        (COSINE, 50, 0.5),
        (COSINE, 100, 1.0),
        (COSINE, 550, 0.1 + 0.9 * 0.5),
        (COSINE, 325, 0.1 + 0.9 * 0.5 * (1 + math.sqrt(0.5))),
        (COSINE, 1000, 0.1),
        (COSINE, 2000, 0.1),
        (WSD, 25, 0.25),
        (WSD, 100, 1.0),
        (WSD, 600, 1.0),
        (WSD, 700, 0.75),
        (WSD, 1000, 0.0),
        (WSD, 1024, 0.0),
    ],
)
def test_worked_values(schedule, tokens, expected):
    assert rate_multiplier(schedule, tokens, budget_tokens=1000) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("schedule", [COSINE, WSD])
def test_rises_then_never_rises_again(schedule):
    values = [rate_multiplier(schedule, t, budget_tokens=1000) for t in range(0, 1001, 10)]
    peak = values.index(max(values))
    assert values[: peak + 1] == sorted(values[: peak + 1])
    assert values[peak:] == sorted(values[peak:], reverse=True)
    assert max(values) == 1.0
    assert min(values) >= 0.0


def test_no_warm_up_and_no_decay_are_constant():
    flat = WarmupStableDecay(kind="wsd", warmup_tokens=0, decay_tokens=0)
    assert [rate_multiplier(flat, t, budget_tokens=100) for t in (0, 1, 50, 100)] == [1.0] * 4
    only_warm_up = Cosine(kind="cosine", warmup_tokens=100, final=0.2)
    assert rate_multiplier(only_warm_up, 100, budget_tokens=100) == 0.2


def test_negative_tokens_are_refused():
    with pytest.raises(ValueError, match="at least 0"):
        rate_multiplier(COSINE, -1, budget_tokens=1000)
