"""The root of a run's configuration: data, model, training and evaluation together."""

from typing import Annotated

from pydantic import Field, model_validator

from nested_lm.config.data import DataConfig
from nested_lm.config.evaluation import EvalConfig
from nested_lm.config.model import ModelConfig
from nested_lm.config.section import Name, Place, Section
from nested_lm.config.train import TrainConfig


class RunConfig(Section):
    """One run: what `nested-lm train` resolves and stores as `config.resolved.yaml`."""

    name: Name  # what reports and trackers call the run
    output_dir: Place  # run folder
    seed: Annotated[int, Field(ge=0, lt=2**32)]  # of weights, order of data and everything drawn
    data: DataConfig  # the data set: text, tokenizer, splits
    model: ModelConfig  # the architecture
    train: TrainConfig  # budget, optimizer, schedule, checkpoints
    eval: EvalConfig  # what `nested-lm eval` measures

    @model_validator(mode="after")
    def _clocks_fit_the_batch(self) -> "RunConfig":
        step = self.train.step_tokens
        for index, period in enumerate(self.model.channel.periods):
            if period % step:
                near = max(1, round(period / step)) * step
                raise ValueError(
                    f"model.channel.levels[{index}].period_tokens {period} is not a "
                    f"multiple of the {step} tokens of one training step (train.context_length x "
                    f"train.batch_size x train.accumulation); try {near}"
                )
        return self

    @model_validator(mode="after")
    def _optimizers_fit_the_levels(self) -> "RunConfig":
        found, levels = len(self.train.optimizer.levels), len(self.model.channel.periods)
        if found not in (0, levels):
            raise ValueError(
                f"train.optimizer.levels has {found} entries, the model's channel memory {levels} levels; give one "
                "entry a level, fastest first (null: as the other matrices), or none at all"
            )
        return self

    @model_validator(mode="after")
    def _chunks_fit_the_context(self) -> "RunConfig":
        alignment = self.model.alignment
        for index, length in enumerate(self.train.context_lengths):
            if length % alignment == 0:
                continue
            is_last = index == len(self.train.curriculum)
            where = "train.context_length" if is_last else f"train.curriculum[{index}].context_length"
            near = max(1, round(length / alignment)) * alignment
            raise ValueError(
                f"{where} {length} is not a multiple of {alignment}, "
                f"the tokens between two places where a document may start: the longest chunk of the model's memories, "
                f"and the shortest in-context period of its levels; try {near}"
            )
        return self

    @model_validator(mode="after")
    def _levels_can_write(self) -> "RunConfig":
        if not self.model.writes_in_context:
            return self
        period = self.model.channel.alignment
        shortest = min(self.train.context_lengths)
        if period >= shortest:
            raise ValueError(
                f"the shortest in-context period of model.channel, {period} tokens, is not shorter than "
                f"the shortest train.context_length {shortest}: a level writes when the first token after its "
                f"period is there, so none would ever write in training; try a period of "
                f"{max(1, shortest // 4)}"
            )
        if self.train.compile:
            raise ValueError(
                "train.compile cannot compile a model whose levels are written in context, because its forward pass "
                "takes gradients; set train.compile=false, or remove `in_context` from the levels of model.channel"
            )
        return self

    @model_validator(mode="after")
    def _weights_are_not_set_back(self) -> "RunConfig":
        if self.train.ewc is not None and self.model.channel.restarts_levels:
            raise ValueError(
                "train.ewc holds weights near where a period left them, but with wiring nested the levels are set "
                "back to their starts on their own clocks; use model.channel.wiring=sequential, or remove train.ewc"
            )
        return self

    @property
    def document_alignment(self) -> int:
        """Packed documents start at multiples of this many tokens, so that memory borders never cross one."""
        return self.model.alignment
