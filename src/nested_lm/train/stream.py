"""The batches of a run in order: shuffled, or period after period, with the borders between periods."""

from collections.abc import Mapping
from typing import Any

from nested_lm.config.run import RunConfig
from nested_lm.config.train import Chronological
from nested_lm.data.loader import Batch, PackedLoader, period_plan
from nested_lm.data.shards import TokenDataset
from nested_lm.train.strategy import micro_batches


class TrainingStream:
    """Hands out this rank's micro-batches of each step.

    A shuffled stream is one loader. A chronological one is a loader per group of periods, used one after the
    other for the same number of steps each; a number of steps that does not divide evenly is rounded down, so
    that every group gets equal tokens and the budget is not exceeded.

    Raises:
        DataError: a chronological stream over a data set without enough dated periods.
    """

    def __init__(self, config: RunConfig, dataset: TokenDataset, *, rank: int, world_size: int) -> None:
        train = config.train
        self._micro_batches, batch_size = micro_batches(train, world_size)
        groups: list[tuple[int, ...] | None] = [None]
        if isinstance(train.stream, Chronological):
            groups = list(period_plan(dataset, train.stream.periods))
        self.is_chronological = isinstance(train.stream, Chronological)
        self.steps_per_period = train.num_steps // len(groups)
        self.total_steps = self.steps_per_period * len(groups)
        self._step = 0
        self._loaders = [
            PackedLoader(
                dataset,
                context_length=train.context_length,
                batch_size=batch_size,
                seed=config.seed,
                align=config.document_alignment,
                rank=rank,
                world_size=world_size,
                periods=group,
            )
            for group in groups
        ]

    def next_step(self) -> list[Batch]:
        """Micro-batches of the next step."""
        loader = self._loaders[self._step // self.steps_per_period]
        self._step += 1
        return [loader.next() for _ in range(self._micro_batches)]

    def milestone(self, step: int) -> str | None:
        """Name of the border that lies after `step` steps: `period-0` before the first period, and so on."""
        if not self.is_chronological or step % self.steps_per_period:
            return None
        return f"period-{step // self.steps_per_period}"

    def state_dict(self) -> dict[str, Any]:
        """Position: small and JSON-able."""
        return {"step": self._step, "loaders": [loader.state_dict() for loader in self._loaders]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the batches that were handed out when the state was taken.

        Raises:
            DataError: the state belongs to another data set, seed or batch shape.
        """
        for loader, saved in zip(self._loaders, state["loaders"], strict=True):
            loader.load_state_dict(saved)
        self._step = state["step"]
