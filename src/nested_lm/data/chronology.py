"""Which documents a stream that reads period after period takes in each of its stages."""

from dataclasses import dataclass
from typing import Literal

from nested_lm.data.loader import chosen_documents, period_plan
from nested_lm.data.shards import TokenDataset

Order = Literal["forward", "reverse", "shuffled"]


@dataclass(frozen=True)
class ReadingGroup:
    """Documents of one stage: those of these periods, and of them a share of the tokens in an order drawn from a seed.

    The same group of another split holds the text that is held out for the stage.
    """

    label: str
    periods: tuple[int, ...]
    part: tuple[float, float] = (0.0, 1.0)

    def documents(self, dataset: TokenDataset, *, seed: int) -> list[int]:
        """Indices of the group's documents in a split. Raises DataError when it has none."""
        return [int(i) for i in chosen_documents(dataset, periods=self.periods, part=self.part, seed=seed)]


def reading_groups(training: TokenDataset, periods: int, *, order: Order) -> list[ReadingGroup]:
    """Cut a training split into stages, in the order in which they are read.

    forward, reverse: runs of neighbouring periods of near-equal tokens, by time or against it. shuffled: as many
    shares of all dated documents, dealt out at random, so that no stage differs from another but by chance.

    Raises: DataError when the data set has no dates, or fewer dated periods than are asked for.
    """
    plan = period_plan(training, periods)
    if order == "shuffled":
        everything = tuple(period for group in plan for period in group)
        return [
            ReadingGroup(f"share {index + 1} of {periods}", everything, (index / periods, (index + 1) / periods))
            for index in range(periods)
        ]
    groups = []
    for chosen in plan:
        first, last = training.periods[chosen[0]], training.periods[chosen[-1]]
        groups.append(ReadingGroup(f"{first.first_year}-{last.last_year}", chosen))
    return groups if order == "forward" else groups[::-1]
