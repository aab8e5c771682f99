"""An ablation grid: named deltas on one preset, each of which may change one factor."""

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from nested_lm.config.section import Name, Section

Overrides = Annotated[tuple[str, ...], Field(strict=False)]

_WIDTH = re.compile(r"\+*model\.(channel\.(levels\.\d+\.)?expansion|mixer\.(head_width|expansion|value_expansion))=.*")
"""What a balance may set: the widths that size a model and nothing else."""


class PaperRow(Section):
    """The row of the paper's Table 6 that asks the same question (arXiv 2512.24695).

    sense: `same` when the variant leaves out what the row leaves out; `reversed` when our base is already without it
        and the variant puts it in, so that our variant stands for the paper's full model.
    """

    row: Annotated[str, Field(min_length=1)]
    sense: Literal["same", "reversed"] = "same"


class Variant(Section):
    """One delta on the base preset.

    factor: the question it belongs to; variants of one factor are compared with each other and with the base.
    change: what is different, in words.
    delta: the overrides that make the difference.
    fields: the settings that may differ for it, each with everything below it.
    balance: overrides of widths that bring the number of parameters back to the base's. Part of the delta.
    against: the variant whose delta this one comes on top of, and with which it is compared; null: the base.
    """

    factor: Annotated[str, Field(min_length=1)]
    change: Annotated[str, Field(min_length=1)]
    delta: Annotated[Overrides, Field(min_length=1)]
    fields: Annotated[Overrides, Field(min_length=1)]
    balance: Overrides = ()
    against: Name | None = None
    paper: PaperRow | None = None

    @model_validator(mode="after")
    def _balance_sets_widths(self) -> "Variant":
        for override in self.balance:
            if not _WIDTH.fullmatch(override):
                raise ValueError(
                    f"balance {override!r} is not a width; it may set model.channel.expansion, "
                    "model.channel.levels.N.expansion, or head_width, expansion and value_expansion of model.mixer. "
                    "What is to be compared belongs into delta"
                )
        return self


class AblationConfig(Section):
    """A base preset and its variants by name. A variant set to null is left out of the grid."""

    title: Annotated[str, Field(min_length=1)]  # headline of its table
    base: Annotated[str, Field(min_length=1)]  # run preset
    variants: dict[Name, Variant | None]  # one factor each

    @model_validator(mode="after")
    def _there_are_variants(self) -> "AblationConfig":
        if "base" in self.variants:
            raise ValueError("a variant cannot be called `base`: that is the preset all are compared with; rename it")
        if not self.chosen:
            raise ValueError("no variant is left; give at least one, or name the run in a train step of a campaign")
        for name, variant in self.chosen.items():
            before = list(self.chosen)[: list(self.chosen).index(name)]
            if variant.against is not None and variant.against not in before:
                raise ValueError(
                    f"variant {name!r} is compared with {variant.against!r}, which is no variant before it; "
                    f"name one of {', '.join(before) or '(none)'}, or leave `against` out for the base"
                )
        return self

    @property
    def chosen(self) -> dict[str, Variant]:
        """The variants that are not null, in the order of the file."""
        return {name: variant for name, variant in self.variants.items() if variant is not None}
