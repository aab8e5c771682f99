"""Evaluate one run: load its newest checkpoint once, run its tasks, write one result file a task."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from nested_lm.checkpoint import (
    LoadedCheckpoint,
    load_model,
    newest_checkpoint,
)
from nested_lm.config.evaluation import EvalConfig
from nested_lm.config.train import Chronological
from nested_lm.data.chronology import reading_groups
from nested_lm.data.shards import TokenDataset
from nested_lm.errors import CheckpointError, ConfigError, DataError, NumericsError
from nested_lm_lab.evaluation.bootstrap import Bootstrap
from nested_lm_lab.evaluation.identity import identify, mark_checkpoint, result_of
from nested_lm_lab.evaluation.results import readable_result, write_result
from nested_lm_lab.evaluation.schema import CheckpointMark, Metrics, RunIdentity
from nested_lm_lab.tasks import language_modelling, sampling
from nested_lm_lab.tasks import passkey as needle
from nested_lm_lab.tasks.continual import chronological
from nested_lm_lab.tasks.continual.borders import border_checkpoints, mark_borders
from nested_lm_lab.tasks.language_modelling import Reading

_CHECKPOINTS = "checkpoints"


def evaluate_run(
    run_dir: Path,
    tasks: tuple[str, ...] | None = None,
    *,
    settings: EvalConfig | None = None,
    device: Literal["cpu", "cuda"] | None = None,
    report: Callable[[str], None] = print,
) -> list[Path]:
    """Run evaluations on the newest checkpoint of a run and return the paths of their result files.

    A result of the same checkpoint, configuration and task version is kept.

    Args:
        run_dir: run folder.
        tasks: names; None: all that the settings ask for.
        settings: what to measure; None: the section `eval` that the run was trained with.
        device: where; None: a GPU when there is one, unless the run was configured for the CPU.
        report: told one line a task.

    Raises:
        ConfigError: a task that does not exist or that the run's configuration leaves out.
        CheckpointError: no valid checkpoint, or one of other data.
        NumericsError: a score is not finite; that task writes nothing.
    """
    unknown = [name for name in tasks or () if name not in _TASKS]
    if unknown:
        raise ConfigError(f"unknown task {unknown[0]!r}; choices: {', '.join(_TASKS)}")
    newest = newest_checkpoint(run_dir / _CHECKPOINTS, report=report)
    if newest is None:
        raise CheckpointError(
            f"{run_dir} has no valid checkpoint below {_CHECKPOINTS}/; train the run first: `nested-lm train`"
        )
    evaluation = _Evaluation(run_dir, newest, load_model(newest, device="cpu"), settings, device, report)
    asked = evaluation.settings.tasks(chronological=isinstance(evaluation.config.train.stream, Chronological))
    for name in tasks or ():
        if name not in asked:
            raise ConfigError(
                f"task {name!r} is not part of run {evaluation.config.name!r}: "
                f"{_TASKS[name].missing}; its tasks: {', '.join(asked) or 'none'}"
            )
    return [evaluation.run(name) for name in tasks or asked]


class _Evaluation:
    """One checkpoint, its data and the tasks that can be run on them."""

    def __init__(
        self,
        run_dir: Path,
        path: Path,
        loaded: LoadedCheckpoint,
        settings: EvalConfig | None,
        device: str | None,
        report: Callable[[str], None],
    ) -> None:
        self.run_dir = run_dir
        self.path = path
        self.loaded = loaded
        self.config = loaded.config
        self.settings = settings or loaded.config.eval
        self.report = report
        usual = "cuda" if torch.cuda.is_available() and self.config.train.device != "cpu" else "cpu"
        self.device = torch.device(device or usual)
        loaded.model.to(self.device)
        self.bootstrap = Bootstrap(samples=self.settings.bootstrap_samples)
        self.reading = Reading(
            context_length=self.config.train.context_length,
            batch_size=self.settings.batch_size,
            align=self.config.document_alignment,
        )
        self.splits: dict[str, TokenDataset] = {}

    def run(self, name: str) -> Path:
        """Run one task, unless its result is there already, and write its result."""
        task = _TASKS[name]
        path = self.run_dir / "results" / f"{name}.json"
        started = time.perf_counter()
        mark = task.mark(self)
        settings = task.settings(self)
        if self._is_current(path, task.version, settings, mark):
            self.report(f"{name}: kept, {path} is of this checkpoint already")
            return path
        try:
            metrics = task.measure(self)
            fields = {
                "task": name,
                "task_version": task.version,
                "identity": self.identity,
                "settings": settings,
                "checkpoint": mark,
            }
            result = result_of(metrics, fields, device=self.device, started=started)
        except NumericsError as error:
            raise NumericsError(f"{name} on {self.path}: {error}") from error
        write_result(path, result)
        self.report(f"{name}: {result.wall_seconds:.1f} s, {path}")
        return path

    def _is_current(self, path: Path, version: str, settings: dict[str, Any], mark: CheckpointMark) -> bool:
        old = readable_result(path, self.report)
        if old is None:
            return False
        kept = (old.task_version, old.settings, old.checkpoint, old.identity)
        return kept == (version, settings, mark, self.identity)

    @cached_property
    def identity(self) -> RunIdentity:
        """What the numbers come from. The arm is the kind of mixer and channel memory."""
        return identify(self.loaded, data_hash=self._data_hash)

    def _data_hash(self) -> str:
        """Identity of the data set in use, for a converted model, which was trained on none of ours."""
        return TokenDataset.open(Path(self.config.data.output_dir), "train").data_hash

    def split(self, name: Literal["train", "validation", "test"]) -> TokenDataset:
        """Open a split once.

        Raises:
            CheckpointError: the data set has another tokenizer than the checkpoint.
            DataError: it was built again with other content.
        """
        if name not in self.splits:
            found = TokenDataset.open(Path(self.config.data.output_dir), name)
            if found.tokenizer_hash != self.identity.tokenizer_hash:
                raise CheckpointError(
                    f"{self.path} was trained with tokenizer {self.identity.tokenizer_hash[:16]}, "
                    f"{found.folder} has {found.tokenizer_hash[:16]}; build the data set of the run again"
                )
            if found.data_hash != self.identity.data_hash:
                raise DataError(
                    f"{found.folder} has data hash {found.data_hash[:16]}, the run was trained on "
                    f"{self.identity.data_hash[:16]}: test documents may have been trained on. "
                    "Build the data set of the run again, or train on this one"
                )
            self.splits[name] = found
        return self.splits[name]


def _newest_mark(evaluation: _Evaluation) -> CheckpointMark:
    return mark_checkpoint(evaluation.path)


def _section_settings(name: str) -> Callable[[_Evaluation], dict[str, Any]]:
    def settings(evaluation: _Evaluation) -> dict[str, Any]:
        section = getattr(evaluation.settings, name).model_dump(mode="json")
        return section | {"bootstrap_samples": evaluation.settings.bootstrap_samples}

    return settings


def _measure_language_modelling(evaluation: _Evaluation) -> Metrics:
    config = evaluation.settings.language_modelling
    assert config is not None
    return language_modelling.evaluate(
        evaluation.loaded.model,
        evaluation.split(config.split),
        evaluation.split("train"),
        config,
        reading=evaluation.reading,
        bootstrap=evaluation.bootstrap,
    )


def _measure_passkey(evaluation: _Evaluation) -> Metrics:
    assert evaluation.settings.passkey is not None
    return needle.evaluate(
        evaluation.loaded.model,
        evaluation.loaded.tokenizer,
        evaluation.settings.passkey,
        reading=evaluation.reading,
        bootstrap=evaluation.bootstrap,
    )


def _measure_sampling(evaluation: _Evaluation) -> Metrics:
    assert evaluation.settings.sampling is not None
    return sampling.evaluate(evaluation.loaded.model, evaluation.loaded.tokenizer, evaluation.settings.sampling)


def _borders(evaluation: _Evaluation) -> list[Path]:
    stream = evaluation.config.train.stream
    assert isinstance(stream, Chronological)
    return border_checkpoints(evaluation.run_dir, stream.periods, report=evaluation.report)


def _border_mark(evaluation: _Evaluation) -> CheckpointMark:
    return mark_borders(_borders(evaluation))


def _continual_settings(evaluation: _Evaluation) -> dict[str, Any]:
    stream = evaluation.config.train.stream
    assert isinstance(stream, Chronological)
    section = evaluation.settings.continual.model_dump(mode="json")
    return section | {
        "periods": stream.periods,
        "order": stream.order,
        "bootstrap_samples": evaluation.settings.bootstrap_samples,
    }


def _measure_continual(evaluation: _Evaluation) -> Metrics:
    stream = evaluation.config.train.stream
    assert isinstance(stream, Chronological)
    training = evaluation.split("train")
    splits = (evaluation.split("validation"), evaluation.split("test"))
    groups = reading_groups(training, stream.periods, order=stream.order)
    max_pieces = evaluation.settings.continual.pieces_per_document
    segments = chronological.segment_documents(
        splits,
        groups,
        seed=evaluation.config.seed,
        context_length=evaluation.reading.context_length,
        max_pieces=max_pieces,
    )
    return chronological.matrix_over(
        (
            load_model(path, device=evaluation.device, tokenizer_hash=training.tokenizer_hash)
            for path in _borders(evaluation)
        ),
        lambda loaded: chronological.score_segments(
            loaded.model, splits, segments, reading=evaluation.reading, max_pieces=max_pieces
        ),
        segments,
        evaluation.bootstrap,
    )


@dataclass(frozen=True)
class _Task:
    version: str
    settings: Callable[[_Evaluation], dict[str, Any]]
    mark: Callable[[_Evaluation], CheckpointMark]
    measure: Callable[[_Evaluation], Metrics]
    missing: str  # why a run may not have it


_TASKS = {
    "language_modelling": _Task(
        language_modelling.TASK_VERSION,
        _section_settings("language_modelling"),
        _newest_mark,
        _measure_language_modelling,
        "eval.language_modelling is null",
    ),
    "passkey": _Task(
        needle.TASK_VERSION,
        _section_settings("passkey"),
        _newest_mark,
        _measure_passkey,
        "eval.passkey is null",
    ),
    "sampling": _Task(
        sampling.TASK_VERSION,
        _section_settings("sampling"),
        _newest_mark,
        _measure_sampling,
        "eval.sampling is null",
    ),
    "continual": _Task(
        chronological.TASK_VERSION,
        _continual_settings,
        _border_mark,
        _measure_continual,
        "train.stream is not chronological",
    ),
}
