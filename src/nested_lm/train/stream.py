"""The batches of a run in order, stage after stage: by chronological period, by context length, or all in one."""

from bisect import bisect_right
from collections.abc import Mapping
from typing import Any

from nested_lm.config.run import RunConfig
from nested_lm.config.train import Chronological, TrainConfig
from nested_lm.data.chronology import ReadingGroup, reading_groups
from nested_lm.data.facts import FactWriter
from nested_lm.data.loader import Batch, PackedLoader
from nested_lm.data.manifest import TOKENIZER
from nested_lm.data.shards import TokenDataset
from nested_lm.data.tokenizer import TextTokenizer
from nested_lm.errors import DataError
from nested_lm.train.replay import Replay, joined
from nested_lm.train.strategies.base import micro_batches


class TrainingStream:
    """Hands out this rank's micro-batches of each step.

    A shuffled stream is one loader. A chronological one is a loader per group of periods, used one after the
    other for the same number of steps each; a number of steps that does not divide evenly is rounded down, so
    that every group gets equal tokens and the budget is not exceeded. With replay, a share of the rows comes from
    groups that were read before (`Replay`). A curriculum is a loader per context length:
    each stage reads the share of the documents that it has of the budget, so that no text is read at two lengths,
    and a micro-batch has as many more sequences as they are shorter.

    Raises:
        DataError: a chronological stream over a data set without enough dated periods, or with too little text in
            one to be read once, or too few documents for a stage.
        ConfigError: the ranks cannot share a step evenly, replay takes every row of a period, or facts do not fit.
    """

    def __init__(self, config: RunConfig, dataset: TokenDataset, *, rank: int, world_size: int) -> None:
        train = config.train
        self._micro_batches, self._rows = micro_batches(train, world_size)
        rows = self._rows
        common = {"seed": config.seed, "align": config.document_alignment, "rank": rank, "world_size": world_size}
        self._step = 0
        self._loaders: list[PackedLoader] = []
        self.groups: list[ReadingGroup] = []
        self._replay: Replay | None = None
        self._writer = _fact_writer(config, dataset)
        self._step_tokens, self._rank, self._world_size = train.step_tokens, rank, world_size
        if isinstance(train.stream, Chronological):
            self.groups = reading_groups(dataset, train.stream.periods, order=train.stream.order)
            steps = train.num_steps // len(self.groups)
            self._ends = [steps * (index + 1) for index in range(len(self.groups))]
            self._milestones = {steps * index: f"period-{index}" for index in range(len(self.groups) + 1)}

            def loader_of(group: ReadingGroup) -> PackedLoader:
                chosen = {"periods": group.periods, "part": group.part}
                return PackedLoader(dataset, context_length=train.context_length, batch_size=rows, **chosen, **common)

            self._loader_of = loader_of
            self._loaders = [loader_of(group) for group in self.groups]
            _require_one_pass(train, self.groups, self._loaders, steps=steps)
            if train.stream.replay:
                self._replay = Replay(
                    [loader_of(group) for group in self.groups[:-1]],
                    share=train.stream.replay,
                    rows=rows,
                    world_size=world_size,
                    micro_batches=steps * self._micro_batches,
                )
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
        stage = bisect_right(self._ends, self._step)
        begin = self._ends[stage - 1] if stage else 0
        first = (self._step - begin) * self._micro_batches
        self._step += 1
        return [self._next(stage, first + index) for index in range(self._micro_batches)]

    def _next(self, stage: int, index: int) -> Batch:
        """Micro-batch `index` of a stage."""
        loader = self._loaders[stage]
        if self._writer is not None:
            batch, step = loader.next(), self._step - 1
            micro_batch = index % self._micro_batches * self._world_size + self._rank
            first_row = micro_batch * len(batch.inputs)
            return self._writer.write(batch, step=step, tokens=step * self._step_tokens, first_row=first_row)
        if self._replay is None or stage == 0:
            return loader.next()
        new, old = self._replay.rows_of(index)
        parts = [loader.next(new)] if new else []
        return joined([*parts, self._replay.next(stage, index, old)] if old else parts)

    def milestone(self, step: int) -> str | None:
        """Name the border after `step` steps: `period-0` before the first period, `context-2048` after that stage."""
        return self._milestones.get(step)

    def passed_group(self, step: int) -> int | None:
        """Index of the group whose last step this is; None within a group, and for other streams."""
        return self._ends.index(step) if self.groups and step in self._ends else None

    def first_rows(self, group: int, count: int) -> Batch:
        """The rows that a group's stage reads first, `count` or as many of its own as it reads."""
        read = self._ends[0] * self._micro_batches * self._rows
        if self._replay is not None and group:
            read = self._replay.own_rows
        return self._loader_of(self.groups[group]).next(min(count, read))

    def state_dict(self) -> dict[str, Any]:
        """Position: small and JSON-able."""
        state = {"step": self._step, "loaders": [loader.state_dict() for loader in self._loaders]}
        return state if self._replay is None else state | {"replay": self._replay.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the batches that were handed out when the state was taken.

        Raises:
            DataError: the state belongs to another data set, seed or batch shape.
        """
        for loader, saved in zip(self._loaders, state["loaders"], strict=True):
            loader.load_state_dict(saved)
        if self._replay is not None:
            self._replay.load_state_dict(state["replay"])
        self._step = state["step"]


def _fact_writer(config: RunConfig, dataset: TokenDataset) -> FactWriter | None:
    facts = config.train.facts
    if facts is None:
        return None
    tokenizer = TextTokenizer.load(dataset.folder / TOKENIZER)
    return FactWriter(facts, tokenizer, seed=config.seed, shortest_context=min(config.train.context_lengths))


def _stage_ends(train: TrainConfig) -> list[int]:
    """Steps after which each stage of the curriculum ends, the last one with the budget."""
    return [*(stage.until_tokens // train.step_tokens for stage in train.curriculum), train.num_steps]


def _require_one_pass(
    train: TrainConfig, groups: list[ReadingGroup], loaders: list[PackedLoader], *, steps: int
) -> None:
    """Refuse a budget that would read a group's text more than once."""
    assert isinstance(train.stream, Chronological)
    for index, (group, loader) in enumerate(zip(groups, loaders, strict=True)):
        new = steps * train.step_tokens * (1.0 - (train.stream.replay if index else 0.0))
        if new > loader.epoch_tokens:
            budget = len(groups) * (loader.epoch_tokens // train.step_tokens) * train.step_tokens
            raise DataError(
                f"the chronological stream reads {new:,.0f} tokens of {group.label}, whose training text has "
                f"{loader.epoch_tokens:,}: it would be read more than once, and no period may be\n"
                f"  Lower train.budget_tokens to at most {budget:,}, use fewer train.stream.periods, or more text."
            )
