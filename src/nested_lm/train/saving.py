"""Saves and restores everything a run needs to continue bit for bit."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from nested_lm.checkpoint import (
    check_tokenizer,
    folder_name,
    list_checkpoints,
    load_weights,
    newest_checkpoint,
    prune_checkpoints,
    read_document,
    read_identity,
    read_tensors,
    remove_stale,
    write_checkpoint,
)
from nested_lm.config.run import RunConfig
from nested_lm.config.secrets import redact
from nested_lm.data.shards import TokenDataset
from nested_lm.errors import CheckpointError
from nested_lm.nn.model import LanguageModel
from nested_lm.optim.clocked import ClockedOptimizer
from nested_lm.train.elastic import ElasticPenalty
from nested_lm.train.stability import NonFiniteWatch, check_weights
from nested_lm.train.state import STATE_VERSION, Progress, random_state, set_random_state
from nested_lm.train.strategies.base import Strategy
from nested_lm.train.stream import TrainingStream
from nested_lm.train.update_norms import UpdateNorms

_ELASTIC = "elastic"  # file stem


@dataclass
class RunState:
    """All objects of a run that change while it trains. A new stateful part joins by adding a field here."""

    model: LanguageModel
    optimizer: ClockedOptimizer
    stream: TrainingStream
    watch: NonFiniteWatch
    update_norms: UpdateNorms
    progress: Progress
    elastic: ElasticPenalty | None = None


class CheckpointKeeper:
    """The checkpoints of one run folder.

    newest: the newest valid one; None before the first.
    """

    def __init__(
        self,
        root: Path,
        config: RunConfig,
        dataset: TokenDataset,
        strategy: Strategy,
        *,
        identity: dict[str, Any],
    ) -> None:
        self._notes, self.newest = strategy.lead(lambda: _tidied(root))
        self._root, self._config, self._dataset = root, config, dataset
        self._strategy, self._identity = strategy, identity

    def newest_step(self) -> int | None:
        """Step of the newest checkpoint."""
        return None if self.newest is None else read_document(self.newest, "train_state.json")["step"]

    def take_notes(self) -> list[str]:
        """Sentences about folders that are damaged, stale or cannot be deleted; forgets them."""
        notes, self._notes = self._notes, []
        return notes

    def save(self, state: RunState) -> Path:
        """Write the checkpoint of the current step, then delete the ones that retention no longer keeps.

        Raises:
            NumericsError: a weight is not finite; nothing is written.
            CheckpointError: it cannot be written; older ones are kept.
        """
        weights = self._strategy.gather(state.model.state_dict())
        moments = self._strategy.gather(state.optimizer.state_tensors())
        tensors = {"model": weights, "optimizer": moments}
        if state.elastic is not None and (held := state.elastic.state_tensors()):
            tensors[_ELASTIC] = held
        self.newest = self._strategy.lead(lambda: self._write(state, tensors))
        return self.newest

    def _write(self, state: RunState, tensors: dict[str, dict[str, Tensor]]) -> Path:
        """Write what was gathered, on rank 0."""
        step = state.progress.step
        check_weights(tensors["model"], step=step, last_good=self.newest)
        folder = self._root / folder_name(step)
        write_checkpoint(
            folder,
            tensors=tensors,
            documents={
                "train_state.json": {
                    "schema_version": STATE_VERSION,
                    **state.progress.as_document(),
                    "stream": state.stream.state_dict(),
                    "watch": state.watch.state_dict(),
                    "update_norms": state.update_norms.pending,
                    "random": random_state(),
                },
                "config.json": redact(self._config.model_dump(mode="json")),
                "run.json": self._identity,
            },
            extra_files={"tokenizer.json": self._dataset.folder / "tokenizer.json"},
            config_hash=self._identity["config_hash"],
            milestone=state.stream.milestone(step),
        )
        try:
            prune_checkpoints(self._root, keep=self._config.train.checkpoints.keep)
        except CheckpointError as error:  # what is too many harms nothing
            self._notes.append(str(error))
        return folder

    def restore(self, state: RunState) -> None:
        """Put a freshly made run where its newest checkpoint was taken.

        Raises:
            CheckpointError: the checkpoint belongs to another configuration, model or tokenizer.
            DataError: its position belongs to another data set.
        """
        path = self.newest
        assert path is not None
        identity = read_identity(path)
        if identity["config_hash"] != self._identity["config_hash"]:
            raise CheckpointError(
                f"{path} was written with configuration {identity['config_hash']}, this run has "
                f"{self._identity['config_hash']}; move it to the run folder it came from"
            )
        check_tokenizer(path, identity, self._dataset.tokenizer_hash)
        document = read_document(path, "train_state.json")
        if document["schema_version"] != STATE_VERSION:
            raise CheckpointError(
                f"{path}/train_state.json has schema {document['schema_version']}, this version reads "
                f"{STATE_VERSION}; continue with the version of nested-lm that wrote it"
            )
        place, parameters = self._strategy.place, state.optimizer.parameters
        load_weights(state.model, place(read_tensors(path, "model"), state.model.state_dict()), where=path)
        moments = read_tensors(path, "optimizer")
        like = {name: parameters[part] for name in moments for part in name.split("/") if part in parameters}
        try:
            state.optimizer.load_state_tensors(place(moments, like))
        except ValueError as error:
            raise CheckpointError(f"{path}/optimizer.safetensors does not fit the run: {error}") from error
        if state.elastic is not None and (path / f"{_ELASTIC}.safetensors").exists():  # none before the first border
            try:
                state.elastic.load_state_tensors(read_tensors(path, _ELASTIC))
            except ValueError as error:
                raise CheckpointError(f"{path}/{_ELASTIC}.safetensors does not fit the run: {error}") from error
        state.stream.load_state_dict(document["stream"])
        state.watch.load_state_dict(document["watch"])
        state.update_norms.pending = dict(document["update_norms"])
        state.progress = Progress(document["step"], document["tokens"], document["seconds"])
        set_random_state(document["random"])


def _tidied(root: Path) -> tuple[list[str], Path | None]:
    """Remove unfinished checkpoints; return sentences about what was found, and the newest valid one.

    Raises:
        CheckpointError: there are checkpoints, and none is whole.
    """
    notes = [f"removed unfinished {name}" for name in remove_stale(root)]
    newest = newest_checkpoint(root, report=notes.append)
    if newest is None and list_checkpoints(root):
        damaged = "\n  ".join(notes)
        raise CheckpointError(
            f"no checkpoint in {root} is whole:\n  {damaged}\n"
            "  Restore one of them, or delete them all to start from the beginning."
        )
    return notes, newest
