"""What a result file holds of the zero-shot tasks: every score with its interval, its floors, and every document."""

from typing import Literal

from pydantic import Field, model_validator

from nested_lm.config.section import Count, NonNegativeFloat, Section
from nested_lm_lab.evaluation.interval import Interval, Natural
from nested_lm_lab.evaluation.schema import Metrics
from nested_lm_lab.tasks.zeroshot.settings import Memorize


class Code(Section):
    """The programs that measured. commit: of this project, null outside a git checkout. harness: release of lm-eval."""

    version: str
    commit: str | None
    harness: str


class TaskData(Section):
    """What a task asked. task_version: as the harness names it. task_files: sha256 of its prompts and code.

    source: the hub, or a data folder; file: sha256 of the file there. documents: xxh3_128 of all prompts, choices and
    targets in order: two results with the same one answered the same questions. published: documents of the split.
    known_copy: whether the data folder holds the documents that this project was measured with; null: not from a
    folder, or not compared.
    """

    task_version: str
    task_files: str
    source: str
    file: str | None
    split: str
    documents: str
    published: Count
    licence: str
    known_copy: bool | None = None


class Floors(Section):
    """What needs no model, from the same documents. Of the task's accuracy, except where said.

    chance: guessing among the choices; 0 where the answer is any word. constant: always the same place, or word, the
    best one. bigram: all metrics under the bigram of the training split; null where it was left out.
    """

    chance: float | None
    constant: float | None
    bigram: dict[str, float] | None


class TaskScores(Section):
    """One task.

    printed: metrics of the papers' tables, first the one that counts. cut: documents too long to be read whole.
    standard_errors: as the harness computes them; null where it has no formula. values: of each document.
    gain: of memorising, paired by document: the first printed metric minus that of the plain score; for perplexities,
    by how many nats a document has fewer; null for the plain score.
    """

    task: str
    printed: tuple[str, ...]
    documents: Count
    cut: Natural
    metrics: dict[str, Interval]
    standard_errors: dict[str, NonNegativeFloat | None]
    gain: Interval | None
    tokens_read: Count
    tokens: Count  # if every choice were read from the start
    seconds: NonNegativeFloat
    values: dict[str, tuple[float, ...]]

    @model_validator(mode="after")
    def _one_value_a_document(self) -> "TaskScores":
        for name, column in self.values.items():
            if len(column) != self.documents:
                raise ValueError(f"values.{name} has {len(column)} entries but there are {self.documents} documents")
        missing = [name for name in self.printed if name not in self.metrics]
        if missing:
            raise ValueError(f"printed metric {missing[0]!r} is not among {', '.join(self.metrics)}")
        return self


class Arm(Section):
    """All tasks under one way of reading; with memorising, those with a question after the text.

    memorize: null for the plain score. average: of the papers' accuracies.
    """

    name: str
    memorize: Memorize | None
    tasks: tuple[TaskScores, ...]
    average: Interval | None
    tokens_per_s: NonNegativeFloat  # tokens that the model read
    seconds: NonNegativeFloat


class ZeroShotMetrics(Metrics):
    """Zero-shot tasks. data, floors: by task. The first arm is the plain score."""

    kind: Literal["zeroshot"]
    code: Code
    data: dict[str, TaskData]
    floors: dict[str, Floors]
    bigram_tokens: Natural | None  # training tokens the bigram was counted on; null: left out
    arms: tuple[Arm, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _plain_first(self) -> "ZeroShotMetrics":
        if self.arms[0].memorize is not None:
            raise ValueError("the first arm must be the plain score")
        if [scores.task for scores in self.arms[0].tasks] != list(self.data):
            raise ValueError(f"the plain arm must have the tasks {list(self.data)}, in this order")
        return self
