"""Saves and restores everything a run needs to continue bit for bit."""

from collections.abc import Sequence
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
from nested_lm.train.hooks.base import Hook
from nested_lm.train.nonfinite import check_weights
from nested_lm.train.state import STATE_VERSION, Progress, random_state, set_random_state
from nested_lm.train.strategies.base import Strategy
from nested_lm.train.stream import TrainingStream


@dataclass
class RunState:
    """All objects of a run that change while it trains. A new stateful part is a hook."""

    model: LanguageModel
    optimizer: ClockedOptimizer
    stream: TrainingStream
    progress: Progress
    hooks: Sequence[Hook] = ()

    def milestone(self) -> str | None:
        """Border that the checkpoint of the current step marks."""
        names = (hook.milestone(self.progress.step) for hook in self.hooks)
        return next((name for name in names if name is not None), None)


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
        tensors |= {hook.name: held for hook in state.hooks if (held := hook.state_tensors())}
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
                    **{hook.name: held for hook in state.hooks if (held := hook.state_dict()) is not None},
                    "random": random_state(),
                },
                "config.json": redact(self._config.model_dump(mode="json")),
                "run.json": self._identity,
            },
            extra_files={"tokenizer.json": self._dataset.folder / "tokenizer.json"},
            config_hash=self._identity["config_hash"],
            milestone=state.milestone(),
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
        for hook in state.hooks:
            if hook.name and (path / f"{hook.name}.safetensors").exists():  # there is none while it has no state
                try:
                    hook.load_state_tensors(read_tensors(path, hook.name))
                except ValueError as error:
                    raise CheckpointError(f"{path}/{hook.name}.safetensors does not fit the run: {error}") from error
            if hook.state_dict() is not None:
                hook.load_state_dict(document[hook.name])
        state.stream.load_state_dict(document["stream"])
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
