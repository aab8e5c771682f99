"""The channel memory of Hope-Attention made from a trained Transformer: levels spread over its layers."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from nested_lm.config.channels import ChannelSection, InContext, LevelWrites, check_levels
from nested_lm.config.section import Count, Section


class LayerLevel(Section):
    """One level, to which the MLPs of some layers belong."""

    period_tokens: PositiveInt  # training tokens between two optimizer updates of its MLPs (clock A)
    in_context: LevelWrites | None = None  # clock B; null: the level is not written while it reads


class LayerLevels(ChannelSection):
    """A gated MLP in each layer, assigned to one of a few levels, fastest level first.

    Source: arXiv 2512.24695 section 7.3, and its Llama experiments: the MLP blocks of a trained model are placed in
    levels of different update frequency; no blocks are added. The paper does not say which block goes where. By
    default the layers are cut into runs of near-equal length, the fastest level at the bottom: the order in which
    a token passes the levels of a chain.
    """

    kind: Literal["layer_levels"]
    hidden: Count  # hidden units of every MLP
    levels: Annotated[tuple[LayerLevel, ...], Field(min_length=1, strict=False)]
    assignment: Annotated[tuple[int, ...] | None, Field(strict=False)] = None  # level of each layer; null: in runs
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
    def in_context_settings(self) -> InContext | None:
        """What the writing levels share."""
        return self.in_context

    def levels_of_layers(self, num_layers: int) -> tuple[int, ...]:
        """Index of the level that the MLP of each layer belongs to, bottom layer first."""
        if self.assignment is not None:
            return self.assignment
        return tuple(layer * len(self.levels) // num_layers for layer in range(num_layers))

    def check_layers(self, num_layers: int) -> None:
        """Every layer needs a level that exists, and every level a layer.

        Raises:
            ValueError: with the repair.
        """
        given, count = self.assignment, len(self.levels)
        if count > num_layers:
            raise ValueError(
                f"channel has {count} levels for {num_layers} layers; each level needs the MLP of at least one "
                f"layer: leave {count - num_layers} out"
            )
        if given is not None and len(given) != num_layers:
            raise ValueError(
                f"channel.assignment names the levels of {len(given)} layers, the model has {num_layers}; "
                "give one level a layer, bottom layer first, or leave it out"
            )
        found = set(self.levels_of_layers(num_layers))
        if found != set(range(count)):
            raise ValueError(
                f"channel.assignment uses the levels {sorted(found)}; it must use each of 0 to {count - 1} and no other"
            )

    @model_validator(mode="after")
    def _clocks_fit(self) -> "LayerLevels":
        check_levels(self.periods, self.writes, self.in_context, nested=False)
        return self
