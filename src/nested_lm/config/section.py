"""Base of every configuration section: strict, frozen, finite, no unknown keys."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """Base of every config section: no unknown keys, no silent coercion, no mutation."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, validate_default=True)


Count = Annotated[int, Field(ge=1)]
"""A number of things: at least one."""

Size = Annotated[int, Field(ge=1, le=2**20)]
"""A width or length of tensors: bounded, so that a mistyped number is refused before anything is built."""

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
"""A share of a whole, 0 to 1."""

PositiveFloat = Annotated[float, Field(gt=0.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
"""A name that is safe as a file name."""
