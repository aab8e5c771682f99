"""The batches of a run in order, stage after stage: by chronological period, by context length, or all in one."""

from bisect import bisect_right
from collections.abc import Mapping
from typing import Any

from nested_lm.config.run import RunConfig
from nested_lm.config.train import Chronological, TrainConfig
from nested_lm.data.loader import Batch, PackedLoader, period_plan
from nested_lm.data.shards import TokenDataset
from nested_lm.train.strategy import micro_batches


class TrainingStream:
    """Hands out this rank's micro-batches of each step.

    A shuffled stream is one loader. A chronological one is a loader per group of periods, used one after the
    other for the same number of steps each; a number of steps that does not divide evenly is rounded down, so
    that every group gets equal tokens and the budget is not exceeded. A curriculum is a loader per context length:
    each stage reads the share of the documents that it has of the budget, so that no text is read at two lengths,
    and a micro-batch has as many more sequences as they are shorter.

    Raises:
        DataError: a chronological stream over a data set without enough dated periods, or too few documents for a
            stage.
        ConfigError: the ranks cannot share a step evenly.
    """

    def __init__(self, config: RunConfig, dataset: TokenDataset, *, rank: int, world_size: int) -> None:
        train = config.train
        self._micro_batches, rows = micro_batches(train, world_size)
        common = {"seed": config.seed, "align": config.document_alignment, "rank": rank, "world_size": world_size}
        self._step = 0
        self._loaders: list[PackedLoader] = []
        if isinstance(train.stream, Chronological):
            groups = period_plan(dataset, train.stream.periods)
            steps = train.num_steps // len(groups)
            self._ends = [steps * (index + 1) for index in range(len(groups))]
            self._milestones = {steps * index: f"period-{index}" for index in range(len(groups) + 1)}
            for group in groups:
                loader = PackedLoader(
                    dataset, context_length=train.context_length, batch_size=rows, periods=group, **common
                )
                self._loaders.append(loader)
        else:
            self._ends = _stage_ends(train)
            self._milestones = {
                end: f"context-{length}" for end, length in zip(self._ends[:-1], train.context_lengths, strict=False)
            }
            begin = 0.0
            for end, length in zip(self._ends, train.context_lengths, strict=True):
                part = (begin, end / train.num_steps)
                more = rows * (train.context_length // length)
                self._loaders.append(PackedLoader(dataset, context_length=length, batch_size=more, part=part, **common))
                begin = part[1]
        self.total_steps = self._ends[-1]

    def next_step(self) -> list[Batch]:
        """Micro-batches of the next step."""
        loader = self._loaders[bisect_right(self._ends, self._step)]
        self._step += 1
        return [loader.next() for _ in range(self._micro_batches)]

    def milestone(self, step: int) -> str | None:
        """Name the border after `step` steps: `period-0` before the first period, `context-2048` after that stage."""
        return self._milestones.get(step)

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


def _stage_ends(train: TrainConfig) -> list[int]:
    """Steps after which each stage of the curriculum ends, the last one with the budget."""
    return [*(stage.until_tokens // train.step_tokens for stage in train.curriculum), train.num_steps]
