"""What a data set is: source, tokenizer, splits, chronological segments, shards."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from nested_lm.config.section import Count, Fraction, Name, Place, Section


class EmbeddedSource(Section):
    """A corpus shipped with the package.

    sotu: the State of the Union addresses 1790-2026. domains: speeches, technical proposals, plays, a novel and other
    speeches, a megabyte each; their dates, the first days of 2001 to 2005, are places in a stream and not years.
    """

    kind: Literal["embedded"]
    corpus: Literal["sotu", "domains"] = "sotu"


class FileSource(Section):
    """Files and how their documents are read: what a folder and a data set of the hub share."""

    path: Place
    text_field: str = "text"  # of JSON lines and Parquet rows
    date_field: str | None = None  # ISO date or year; null: undated, one chronological segment
    licence: str = "unknown"  # recorded in the manifest
    on_bad_document: Literal["error", "skip"] = "error"  # not UTF-8, no text field, empty, too large
    max_document_bytes: PositiveInt = 64 * 1024 * 1024
    # absent from what is written when null, so that data sets of earlier versions keep their identity
    cut_characters: Annotated[int, Field(ge=100)] | None = Field(default=None, exclude_if=lambda cut: cut is None)


class FolderSource(FileSource):
    """Every `.txt`, `.jsonl[.gz|.zst]` and `.parquet` file below a folder (or one such file)."""

    kind: Literal["folder"]


class HubSource(FileSource):
    """Files of a data set on the Hugging Face hub, fetched into the folder `path` and read from there.

    The revision is a commit, so that the same preset always means the same bytes. Files below `path` that `files` does
    not name are not read.
    """

    kind: Literal["hub"]
    repository: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]  # owner/name
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]  # commit
    files: Annotated[tuple[str, ...], Field(min_length=1, strict=False)]  # names, or patterns such as data/*.parquet


Source = Annotated[EmbeddedSource | FolderSource | HubSource, Field(discriminator="kind")]


class TrainTokenizer(Section):
    """A byte-level BPE tokenizer trained on the training split."""

    kind: Literal["byte_bpe"]
    vocab_size: Annotated[int, Field(ge=257)]
    max_bytes: PositiveInt | None = None  # text it is trained on, documents spread over the split; null: all of it


class LoadTokenizer(Section):
    """An existing Hugging Face `tokenizer.json`."""

    kind: Literal["file"]
    path: Place


TokenizerSpec = Annotated[TrainTokenizer | LoadTokenizer, Field(discriminator="kind")]


class Split(Section):
    """Shares of the documents, assigned by the hash of the text, so that a document never moves."""

    train: Fraction = 0.90
    validation: Fraction = 0.05
    test: Fraction = 0.05

    @model_validator(mode="after")
    def _shares_sum_to_one(self) -> "Split":
        total = self.train + self.validation + self.test
        if abs(total - 1.0) > 1e-9:
            raise ValueError(
                f"train {self.train} + validation {self.validation} + test {self.test} = {total:g}; "
                "the shares must sum to 1"
            )
        return self


class DataConfig(Section):
    """Text to token shards. `nested-lm data` builds it, training and evaluation read it."""

    name: Name
    output_dir: Place
    source: Source
    tokenizer: TokenizerSpec
    split: Split = Split()
    deduplicate: Literal["exact", "none"] = "exact"
    period_years: Count = 25  # length of one chronological segment
    shard_tokens: Annotated[int, Field(ge=1024)] = 4_194_304
