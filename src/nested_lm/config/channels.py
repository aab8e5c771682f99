"""Channel memories over each token: the Continuum Memory System, and the gated MLP of Transformer++."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from nested_lm.config.section import NonNegativeFloat, PositiveFloat, Section
from nested_lm.config.update_rules import UpdateRule


class LevelWrites(Section):
    """How one level writes while it reads (clock B): a fast copy a sequence, stepped every few tokens."""

    period_tokens: PositiveInt  # tokens of the sequence between two writes
    rate: NonNegativeFloat  # step size; the gradient is the sum over the period's tokens. 0: never written
    rule: UpdateRule  # inner optimizer


class InContext(Section):
    """What all levels that write in context share.

    lifetime: fast copies go back to the learned weights where a document starts, or are carried over documents
        to the end of the stream.
    meta_gradient: how the learned weights are trained through the writes. `first_order` takes a write for a
        constant, so that the outer gradient passes straight through to the learned weights; `second_order`
        differentiates the write.
    """

    lifetime: Literal["document", "stream"]
    meta_gradient: Literal["first_order", "second_order"]


class Level(Section):
    """One level of the Continuum Memory System."""

    period_tokens: PositiveInt  # training tokens between two optimizer updates of this level (clock A)
    expansion: PositiveFloat  # hidden width / model width
    in_context: LevelWrites | None = None  # clock B; null: the level is not written while it reads


class ChannelSection(Section):
    """What every channel's configuration answers, whatever its levels are made of."""

    @property
    def periods(self) -> tuple[int, ...]:
        """Clock A: training tokens between two optimizer updates of each level, fastest first."""
        return ()

    @property
    def writes(self) -> tuple[LevelWrites | None, ...]:
        """Clock B of each level, fastest first; None for a level that is not written in context."""
        return ()

    @property
    def restarts_levels(self) -> bool:
        """Whether a level goes back to its start when the next slower one updates (nested wiring)."""
        return False

    @property
    def in_context_settings(self) -> InContext | None:
        """What the writing levels share; None without one."""
        return None

    @property
    def alignment(self) -> int:
        """Packed documents start at multiples of this many tokens: the shortest period of clock B."""
        return min((writes.period_tokens for writes in self.writes if writes is not None), default=1)


class ContinuumMemory(ChannelSection):
    """Pre-norm residual MLPs, fastest level first, each updated on its own clock.

    wiring: `sequential`, a chain; `nested`, a chain in which a level is set back to its start, which is trained on
        the next slower clock, whenever that clock ticks; `independent`, all levels read the same input and their
        outputs are added with learned weights.
    gated: levels are gated MLPs, silu(W_gate x) * W_in x, with half as many parameters again at the same width; the
        paper leaves the MLP open. false: squared ReLU.

    Source: arXiv 2512.24695 eqs. 70-74. Clock A is that of pre-training, clock B that within a context.
    """

    kind: Literal["cms"]
    levels: Annotated[tuple[Level, ...], Field(min_length=1, strict=False)]
    wiring: Literal["sequential", "nested", "independent"] = "sequential"
    gated: bool = False
    in_context: InContext | None = None  # required when a level has `in_context`

    @property
    def periods(self) -> tuple[int, ...]:
        """Clock A of each level."""
        return tuple(level.period_tokens for level in self.levels)

    @property
    def writes(self) -> tuple[LevelWrites | None, ...]:
        """Clock B of each level."""
        return tuple(level.in_context for level in self.levels)

    @property
    def restarts_levels(self) -> bool:
        """Whether the wiring is nested."""
        return self.wiring == "nested"

    @property
    def in_context_settings(self) -> InContext | None:
        """What the writing levels share."""
        return self.in_context

    @model_validator(mode="after")
    def _levels_fit(self) -> "ContinuumMemory":
        check_levels(self.periods, self.writes, self.in_context, nested=self.restarts_levels)
        return self


class SwiGLU(ChannelSection):
    """Gated MLP of Transformer++."""

    kind: Literal["swiglu"]
    expansion: PositiveFloat  # hidden width / model width


def check_levels(
    periods: Sequence[int],
    writes: Sequence[LevelWrites | None],
    shared: InContext | None,
    *,
    nested: bool,
) -> None:
    """Refuse clocks that cannot run together.

    Args:
        periods: clock A of each level, fastest first.
        writes: clock B of each level, fastest first.
        shared: settings of clock B.
        nested: a level starts again at each update of the next slower one.

    Raises:
        ValueError: with the reason and the repair.
    """
    if nested and len(periods) < 2:
        raise ValueError(
            "wiring nested needs a slower level at whose updates a faster one starts again, and there is one level; "
            "add a level, or use wiring=sequential"
        )
    _check_nest(periods, "level periods", strictly=nested)
    written = [entry.period_tokens for entry in writes if entry is not None]
    _check_nest(written, "in-context periods", strictly=nested)
    if written and shared is None:
        raise ValueError(
            "a level has `in_context`, but `channel.in_context`, which says how long fast copies live and how the "
            "learned weights are trained through their writes, is missing; add "
            "in_context: {lifetime: document, meta_gradient: first_order} to the channel"
        )
    if shared is not None and not written:
        raise ValueError(
            "channel.in_context is set, but no level is written in context; give a level "
            "in_context: {period_tokens: ..., rate: ..., rule: {kind: gd}}, or remove channel.in_context"
        )


def _check_nest(periods: Sequence[int], name: str, *, strictly: bool) -> None:
    """Each period is a multiple of the one before it; strictly: a larger one."""
    for fast, slow in pairwise(periods):
        if slow % fast:
            near = max(1, round(slow / fast)) * fast
            raise ValueError(
                f"{name} {list(periods)} do not nest: {slow} is not a multiple of {fast}, the period of "
                f"the faster level before it; try {near}"
            )
        if strictly and slow == fast:
            raise ValueError(
                f"{name} {list(periods)}: with wiring nested a level starts again at each update of the next slower "
                f"one, so two levels of period {fast} would undo each of the first one's updates; try {2 * fast} for "
                "the slower one, or wiring=sequential"
            )
