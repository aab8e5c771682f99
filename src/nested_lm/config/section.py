"""Base of every configuration section: strict, frozen, finite, no unknown keys."""

import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


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


_NAME_BYTES = 255  # of a file or folder, on every common file system


def _as_place(path: str) -> str:
    expanded = os.path.expanduser(path)  # noqa: PTH111  a Path would drop a trailing slash, and with it change hashes
    if expanded.startswith("~"):
        raise ValueError(f"{path!r} begins with the home of a user who is not known; write ./{path} for that name")
    if "\0" in path:
        raise ValueError(f"{path!r} holds a zero byte, which no name may have")
    if (longest := max((len(part.encode(errors="replace")) for part in Path(expanded).parts), default=0)) > _NAME_BYTES:
        raise ValueError(f"a name of {longest} bytes in {path[:40]!r}...; file systems hold names of {_NAME_BYTES}")
    return expanded


Place = Annotated[str, AfterValidator(_as_place)]
"""Path of a file or folder; a leading `~` is the home of the user."""
