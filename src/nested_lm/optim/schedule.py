"""Learning-rate schedules: pure functions of the tokens seen, so there is nothing to checkpoint."""

import math

from nested_lm.config.train import Cosine, Schedule


def rate_multiplier(schedule: Schedule, tokens_seen: int, *, budget_tokens: int) -> float:
    """Share of the peak rate at which the step that ends after `tokens_seen` tokens is taken.

    Both schedules rise linearly over `warmup_tokens` (the multiplier is 1 once they have passed) and end at
    `final` when `budget_tokens` have passed; beyond the budget they stay there.

    Args:
        schedule: its kind and lengths in tokens.
        tokens_seen: tokens of all steps up to and including this one, at least 0.
        budget_tokens: tokens of the whole run.

    Returns:
        A number between 0 and 1.
    """
    if tokens_seen < 0:
        raise ValueError(f"tokens_seen is {tokens_seen}; it must be at least 0")
    if tokens_seen < schedule.warmup_tokens:
        return tokens_seen / schedule.warmup_tokens
    if isinstance(schedule, Cosine):
        length = budget_tokens - schedule.warmup_tokens
        passed = min(1.0, (tokens_seen - schedule.warmup_tokens) / length) if length else 1.0
        return schedule.final + (1 - schedule.final) * 0.5 * (1 + math.cos(math.pi * passed))
    start = budget_tokens - schedule.decay_tokens
    if tokens_seen <= start:
        return 1.0
    left = max(0.0, (budget_tokens - tokens_seen) / schedule.decay_tokens) if schedule.decay_tokens else 0.0
    return schedule.final + (1 - schedule.final) * left
