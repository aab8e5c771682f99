"""What the papers print, as data."""

from functools import cache
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field

from nested_lm.config.section import Count, Section


class Ablated(Section):
    """Perplexity and mean accuracy in percent."""

    perplexity: float
    accuracy: float


class Table6(Section):
    """The paper's ablation."""

    source: str
    reading: Literal["verified", "secondary"]
    parameters: Count
    full: Ablated
    rows: dict[str, Ablated]

    def change(self, row: str) -> Ablated:
        """What leaving that part out changed."""
        return Ablated(
            perplexity=round(self.rows[row].perplexity - self.full.perplexity, 2),
            accuracy=round(self.rows[row].accuracy - self.full.accuracy, 1),
        )


class LanguageRow(Section):
    """One model of the main tables."""

    model: str
    size: str
    wiki: float
    lambada: float
    average: float
    source: Annotated[str, Field(alias="from")]


class NeedleRow(Section):
    """Shares found, one for each length."""

    model: str
    task: str
    found: Annotated[tuple[float, ...], Field(strict=False)]


class Language(Section):
    """Perplexities and accuracies."""

    source: str
    rows: Annotated[tuple[LanguageRow, ...], Field(strict=False)]


class Needles(Section):
    """Single needles."""

    source: str
    rows: Annotated[tuple[NeedleRow, ...], Field(strict=False)]


class Claim(Section):
    """Something the papers say, and what a run of ours would need to test it: size, and the kind of result."""

    claim: str
    needs_parameters: Count
    kind: str


class Papers(Section):
    """All of `papers.yaml`."""

    table_6: Table6
    language: Language
    needles: Needles
    claims: Annotated[tuple[Claim, ...], Field(strict=False)]


@cache
def papers() -> Papers:
    """The papers' numbers."""
    text = Path(__file__).with_name("papers.yaml").read_text(encoding="utf-8")
    return Papers.model_validate(yaml.safe_load(text))
