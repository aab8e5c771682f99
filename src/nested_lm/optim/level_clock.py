"""Clocks of the Continuum Memory System: which levels update once a number of tokens has passed."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LevelClock:
    """Says which memory levels update after a token. Pure: no state, so nothing to checkpoint.

    periods: tokens between two updates of a level, one entry per level, fastest first; each period is a
        multiple of the one before it, so that a slower level updates on a boundary of the faster one.

    Source: arXiv 2512.24695 eq. 71, with the half-open range of tokens (period tokens, not period + 1).
    """

    periods: tuple[int, ...]

    def __post_init__(self) -> None:
        if any(period < 1 for period in self.periods):
            raise ValueError(f"level periods {self.periods}: each must be at least 1 token")
        for fast, slow in zip(self.periods, self.periods[1:], strict=False):
            if slow % fast:
                raise ValueError(
                    f"level periods {self.periods}: {slow} is not a multiple of {fast}; "
                    "a slower level must update on a boundary of the faster one"
                )

    def due(self, tokens_seen: int) -> tuple[int, ...]:
        """Levels that update once `tokens_seen` tokens have passed, fastest first."""
        return tuple(level for level, period in enumerate(self.periods) if tokens_seen % period == 0)
