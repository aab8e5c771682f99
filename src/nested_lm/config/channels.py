"""Channel memories over each token: the Continuum Memory System, and the gated MLP of Transformer++."""

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from nested_lm.config.section import PositiveFloat, Section


class Level(Section):
    """One level of the Continuum Memory System."""

    period_tokens: PositiveInt  # training tokens between two optimizer updates of this level
    expansion: PositiveFloat  # hidden width / model width


class ContinuumMemory(Section):
    """Chain of pre-norm residual MLPs, fastest level first, each updated on its own clock.

    Source: arXiv 2512.24695 eqs. 70-71 (sequential wiring), clock A of the pre-training phase.
    """

    kind: Literal["cms"]
    levels: Annotated[tuple[Level, ...], Field(min_length=1, strict=False)]

    @model_validator(mode="after")
    def _periods_nest(self) -> "ContinuumMemory":
        periods = [level.period_tokens for level in self.levels]
        for fast, slow in pairwise(periods):
            if slow % fast:
                near = max(1, round(slow / fast)) * fast
                raise ValueError(
                    f"level periods {periods} do not nest: {slow} is not a multiple of {fast}, the period of "
                    f"the faster level before it; try {near}"
                )
        return self


class SwiGLU(Section):
    """Gated MLP of Transformer++."""

    kind: Literal["swiglu"]
    expansion: PositiveFloat  # hidden width / model width
