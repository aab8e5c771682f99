"""What continual learning is measured on: a checkpoint, its run folder if it has one, and its training data."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from nested_lm.checkpoint import (
    LoadedCheckpoint,
    find_checkpoint,
    load_model,
)
from nested_lm.config.run import RunConfig
from nested_lm.config.train import Chronological
from nested_lm.data.chronology import ReadingGroup, reading_groups
from nested_lm.data.shards import TokenDataset
from nested_lm.data.split import SplitName
from nested_lm.errors import CheckpointError, ConfigError, DataError, NumericsError
from nested_lm_lab.evaluation.identity import UNKNOWN_DATA, identify, mark_checkpoint, result_of
from nested_lm_lab.evaluation.progress import Progress
from nested_lm_lab.evaluation.results import readable_result, write_result
from nested_lm_lab.evaluation.schema import CheckpointMark, Metrics, RunIdentity
from nested_lm_lab.tasks.continual.borders import CHECKPOINTS, border_checkpoints


@dataclass
class Subject:
    """One checkpoint. run_dir: null for one that lies outside a run folder. results: where result files go."""

    path: Path
    run_dir: Path | None
    results: Path
    loaded: LoadedCheckpoint
    report: Callable[[str], None]
    _splits: dict[str, TokenDataset] = field(default_factory=dict)

    @classmethod
    def open(
        cls, source: Path, *, device: torch.device, results: Path | None, report: Callable[[str], None]
    ) -> "Subject":
        """Open a run folder (its newest checkpoint) or a checkpoint.

        Raises:
            CheckpointError: it is neither, or damaged, or its tokenizer is not its own.
            ConfigError: a checkpoint outside a run folder, and no folder for results.
        """
        path = find_checkpoint(source, report=report)
        run_dir = path.parent.parent if path.parent.name == CHECKPOINTS else None
        if results is None:
            if run_dir is None:
                raise ConfigError(f"{path} lies in no run folder; say where results go with --output-dir")
            results = run_dir / "results" if source != path else run_dir / "results" / path.name
        return cls(path, run_dir, results, load_model(path, device=device), report)

    @property
    def config(self) -> RunConfig:
        """Of the run."""
        return self.loaded.config

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.loaded.device

    @cached_property
    def identity(self) -> RunIdentity:
        """What the numbers come from."""
        return identify(self.loaded, data_hash=lambda: UNKNOWN_DATA)

    @property
    def mark(self) -> CheckpointMark:
        """The checkpoint."""
        return mark_checkpoint(self.path)

    def _open_split(self, name: SplitName) -> TokenDataset:
        return TokenDataset.open(Path(self.config.data.output_dir), name)

    def split(self, name: SplitName) -> TokenDataset:
        """Open a split of the data set once.

        Raises:
            CheckpointError: the data set has another tokenizer than the checkpoint.
            DataError: it was built again with other content.
        """
        if name not in self._splits:
            found = self._open_split(name)
            if found.tokenizer_hash != self.identity.tokenizer_hash:
                raise CheckpointError(
                    f"{self.path} was trained with tokenizer {self.identity.tokenizer_hash[:16]}, {found.folder} has "
                    f"{found.tokenizer_hash[:16]}; build the data set of the run again"
                )
            if found.data_hash != self.identity.data_hash:
                raise DataError(
                    f"{found.folder} has data hash {found.data_hash[:16]}, the run was trained on "
                    f"{self.identity.data_hash[:16]}: test documents may have been trained on. Build the data set of "
                    "the run again, or train on this one"
                )
            self._splits[name] = found
        return self._splits[name]

    @property
    def stream(self) -> Chronological:
        """The stream that the run read.

        Raises:
            ConfigError: it was not chronological.
        """
        stream = self.config.train.stream
        if not isinstance(stream, Chronological):
            raise ConfigError(
                f"{self.config.name}: train.stream is {stream.kind}; this task compares the periods of a chronological "
                "run: train one with train.stream.kind=chronological"
            )
        return stream

    def groups(self) -> list[ReadingGroup]:
        """Stages of the run's stream, in the order they were read. Raises DataError when the data has no dates."""
        return reading_groups(self.split("train"), self.stream.periods, order=self.stream.order)

    def borders(self) -> list[Path]:
        """Checkpoints `period-0` to `period-S` of the run. Raises as `border_checkpoints`."""
        periods = self.stream.periods
        if self.run_dir is None:
            raise ConfigError(f"{self.path} lies in no run folder, and this task needs the run's border checkpoints")
        return border_checkpoints(self.run_dir, periods, report=self.report)

    def publish(
        self,
        task: str,
        *,
        version: str,
        settings: Mapping[str, Any],
        mark: CheckpointMark,
        measure: Callable[[Progress], Metrics],
    ) -> Path:
        """Measure and write one result file; one of the same checkpoint and settings is kept.

        measure: told where to add the tokens it will read to the total, and to count those it has read.

        Raises:
            NumericsError: a number is not finite; nothing is written.
        """
        path = self.results / f"{task}.json"
        if self._is_current(path, version, settings, mark):
            self.report(f"{task}: kept, {path} is of this checkpoint and these settings already")
            return path
        started = time.perf_counter()
        progress = Progress(0, self.report)
        progress.label = task
        metrics = finite_metrics(lambda: measure(progress))
        fields = {
            "task": task,
            "task_version": version,
            "identity": self.identity,
            "settings": dict(settings),
            "checkpoint": mark,
        }
        result = result_of(metrics, fields, device=self.device, started=started)
        write_result(path, result)
        seconds = result.wall_seconds
        pace = f", {progress.done:,} tokens, {progress.done / seconds:,.0f} tokens/s" if progress.done else ""
        self.report(f"{task}: {seconds:.1f} s{pace}, {path}")
        return path

    def _is_current(self, path: Path, version: str, settings: Mapping[str, Any], mark: CheckpointMark) -> bool:
        old = readable_result(path, self.report)
        if old is None:
            return False
        kept = (old.task_version, old.settings, old.checkpoint, old.identity)
        return kept == (version, settings, mark, self.identity)


def finite_metrics(measure: Callable[[], Metrics]) -> Metrics:
    """Run a measurement; a number that is not finite, which the schema refuses, is an error of ours to explain."""
    try:
        return measure()
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] != "finite_number":
            raise
        where = ".".join(map(str, first["loc"]))
        raise NumericsError(f"{where} is not finite, so nothing was written; evaluate an earlier checkpoint") from error
