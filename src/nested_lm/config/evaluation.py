"""What is measured on a checkpoint."""

from typing import Annotated, Literal

from pydantic import Field

from nested_lm.config.section import Count, Section


class LanguageModelling(Section):
    """Held-out bits per byte: overall, per chronological period, by position, beside n-gram floors."""

    split: Literal["validation", "test"] = "test"
    streaming: bool = True  # also score whole documents with carried state where the model has one
    max_documents: Count | None = None  # null: all


class Passkey(Section):
    """A five-digit key hidden in noise at several lengths; scored by the answer's negative log-likelihood."""

    lengths: Annotated[tuple[Count, ...], Field(min_length=1, strict=False)]  # tokens
    samples: Count = 20  # for each length


class Sampling(Section):
    """Text generated for the report."""

    prompts: Annotated[tuple[str, ...], Field(strict=False)] = ("Fellow-citizens of the Senate",)
    max_new_tokens: Count = 120
    temperature: Annotated[float, Field(gt=0.0)] = 0.8
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 0.95
    top_k: Annotated[int, Field(ge=0)] = 0  # 0: off


class Continual(Section):
    """Loss on every period after every period; measured on runs with a chronological stream only."""

    pieces_per_document: Count | None = 6  # training contexts scored, spread over the document; null: all


class EvalConfig(Section):
    """All evaluations of one run. A task set to null is not run."""

    batch_size: Count = 8
    bootstrap_samples: Annotated[int, Field(ge=100)] = 2000
    language_modelling: LanguageModelling | None = LanguageModelling()
    passkey: Passkey | None = None
    sampling: Sampling | None = None
    continual: Continual = Continual()

    def tasks(self, *, chronological: bool) -> tuple[str, ...]:
        """Tasks asked of a run, in the order they are measured. chronological: it reads in the order of time."""
        names = [name for name in ("language_modelling", "passkey", "sampling") if getattr(self, name) is not None]
        return (*names, "continual") if chronological else tuple(names)
