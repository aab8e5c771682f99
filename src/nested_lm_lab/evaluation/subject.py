"""What is measured: a checkpoint, its run folder if it has one, and its training data."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from nested_lm.checkpoint import (
    LoadedCheckpoint,
    find_checkpoint,
    load_model,
)
from nested_lm.config.evaluation import EvalConfig
from nested_lm.config.run import RunConfig
from nested_lm.config.train import Chronological
from nested_lm.data.chronology import ReadingGroup, reading_groups
from nested_lm.data.shards import TokenDataset
from nested_lm.data.split import SplitName
from nested_lm.errors import CheckpointError, ConfigError, DataError
from nested_lm_lab.evaluation.borders import CHECKPOINTS, border_checkpoints
from nested_lm_lab.evaluation.identity import UNKNOWN_DATA, identify, mark_checkpoint
from nested_lm_lab.evaluation.schema import CheckpointMark, RunIdentity


@dataclass
class Subject:
    """One checkpoint. run_dir: None for one that lies outside a run folder. results: folder where result files go, None
    where there is none. settings: the section `eval`, of the run or of a preset in its place. report: is told lines.
    """

    path: Path
    run_dir: Path | None
    results: Path | None
    loaded: LoadedCheckpoint
    settings: EvalConfig
    report: Callable[[str], None]
    _splits: dict[str, TokenDataset] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        source: Path,
        *,
        device: torch.device | None = None,
        results: Path | None = None,
        settings: EvalConfig | None = None,
        report: Callable[[str], None] = print,
    ) -> "Subject":
        """Open a run folder (its newest checkpoint) or a checkpoint.

        Args:
            device: where the model is put; None: a GPU when there is one, unless the run was configured for the CPU.
            results: where result files go; None: the run's results, or a folder of its own there for a checkpoint that
                is named itself.
            settings: in the place of the run's own section `eval`.

        Raises:
            CheckpointError: it is neither, or damaged, or its tokenizer is not its own.
        """
        path = find_checkpoint(source, report=report)
        run_dir = path.parent.parent if path.parent.name == CHECKPOINTS else None
        if results is None and run_dir is not None:
            results = run_dir / "results" if source != path else run_dir / "results" / path.name
        loaded = load_model(path, device=device or "cpu")
        if device is None and torch.cuda.is_available() and loaded.config.train.device != "cpu":
            loaded.model.to("cuda")
        return cls(path, run_dir, results, loaded, settings or loaded.config.eval, report)

    def place(self, name: str) -> Path:
        """File of a result.

        Raises:
            ConfigError: the checkpoint lies in no run folder.
        """
        if self.results is None:
            raise ConfigError(
                f"{self.path} lies in no run folder; say where the result goes with --output (of `eval continual`: "
                "--output-dir)"
            )
        return self.results / f"{name}.json"

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
        return identify(self.loaded, data_hash=self._data_hash)

    def _data_hash(self) -> str:
        """The data set in use, for a converted model, which was trained on none of ours."""
        try:
            return self._open_split("train").data_hash
        except DataError:
            return UNKNOWN_DATA

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
