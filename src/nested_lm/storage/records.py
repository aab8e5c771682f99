"""What stored documents must say to be relied on. They hold more than that."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt


class Identity(BaseModel):
    """The fields of `run.json` that are relied on; there are more. data_hash: None for a model of other data."""

    model_config = ConfigDict(extra="allow", strict=True)

    run_id: str
    name: str
    config_hash: str
    data_hash: str | None
    tokenizer_hash: str
    seed: int = 0
    commit: str | None = None
    created: str = ""
    device: str = ""
    parameters: int | None = None

    @classmethod
    def check(cls, document: Any) -> dict[str, Any]:
        """The document as it is.

        Raises:
            ValueError: a field is missing or of another type.
        """
        cls.model_validate(document)
        return dict(document)


class Position(BaseModel):
    """How far a checkpoint is: the fields of `train_state.json` that every reader needs."""

    model_config = ConfigDict(extra="allow", strict=True)

    step: NonNegativeInt
    tokens: NonNegativeInt


class StoredFile(BaseModel):
    """Size and digest of a file."""

    model_config = ConfigDict(strict=True)

    bytes: NonNegativeInt
    xxh3_128: str


class Manifest(BaseModel):
    """The manifest of a checkpoint. Names of files have no folders in them."""

    model_config = ConfigDict(strict=True)

    config_hash: str
    milestone: str | None
    files: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")], StoredFile]
