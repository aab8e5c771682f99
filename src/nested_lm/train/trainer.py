"""The training loop: batch, forward, backward, clip, step, log, evaluate, save. The rest hangs on hooks."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import nn

from nested_lm.checkpoint import list_checkpoints
from nested_lm.config.run import RunConfig
from nested_lm.config.secrets import redact
from nested_lm.data.loader import Batch
from nested_lm.data.shards import TokenDataset
from nested_lm.errors import CheckpointError, ConfigError, DataError
from nested_lm.nn.model import LanguageModel
from nested_lm.optim.clocked import ClockedOptimizer
from nested_lm.optim.groups import plan_groups
from nested_lm.optim.level_clock import LevelClock
from nested_lm.optim.schedule import rate_multiplier
from nested_lm.storage.commit import current_commit
from nested_lm.storage.lock import OwnerLock, own_folder
from nested_lm.train.console import TrainConsole
from nested_lm.train.hooks.base import Skipped
from nested_lm.train.hooks.registry import Parts, open_hooks
from nested_lm.train.metrics import MetricsLog, check_sinks, open_sinks, read_records
from nested_lm.train.nonfinite import NonFinite, check_scores
from nested_lm.train.recorder import Outlets, Recorder
from nested_lm.train.run_folder import CHECKPOINTS, METRICS, open_run_folder
from nested_lm.train.saving import CheckpointKeeper, RunState
from nested_lm.train.signals import StopRequest
from nested_lm.train.start import load_start
from nested_lm.train.state import Progress, seed_everything
from nested_lm.train.step import GradientComputer, Gradients
from nested_lm.train.strategies.base import Strategy, open_strategy, peak_memory_mb
from nested_lm.train.stream import TrainingStream
from nested_lm.train.validation import Validator, open_validator

Evaluator = Callable[[LanguageModel, int], Mapping[str, float]]
"""Measures more at each evaluation: given the model and the step, returns fields for the eval record."""

MAX_FAILED_SAVES = 10
"""Checkpoints in a row that the disk may refuse before the run ends."""

EXIT_CODES = {None: 0, "SIGTERM": 143, "SIGINT": 130}
"""What a process that trained exits with, by the signal that stopped it (128 + its number)."""


@dataclass(frozen=True)
class TrainSummary:
    """How a call of `train` ended.

    stopped_by: `SIGTERM` or `SIGINT` when the run was asked to stop; None when it reached its budget.
    checkpoint: the newest one.
    """

    folder: Path
    step: int
    tokens: int
    stopped_by: str | None
    checkpoint: Path | None

    @property
    def exit_code(self) -> int:
        """Exit code of the process: 0, or 143 (SIGTERM) or 130 (Ctrl-C) after a clean stop."""
        return EXIT_CODES[self.stopped_by]


def train(
    config: RunConfig,
    *,
    resume: Literal["auto", "never"] = "auto",
    evaluators: Sequence[Evaluator] = (),
    console: Console | None = None,
) -> TrainSummary:
    """Train a run to its budget, or go on with it.

    Seeds are set before the model is made. With `resume="auto"` a run folder that holds checkpoints of the
    same configuration continues from the newest valid one, bit for bit on a CPU; a finished run says so and
    returns. SIGTERM or Ctrl-C finish the current step, save, and return with `stopped_by` set.

    Started by torchrun with `train.strategy` fsdp2, every process calls this and trains its share; rank 0 alone
    writes. The number of processes changes the result by rounding only, and may change when a run is resumed.

    Args:
        config: what to train and where.
        resume: `never` refuses a folder that already holds a run.
        evaluators: called at each evaluation.
        console: where progress is shown; the standard output when None.

    Raises:
        ConfigError: a device, package or folder that cannot be used, or a folder with another run.
        DataError: the data set is missing or damaged.
        CheckpointError: damaged or foreign checkpoints, or no space for new ones.
        InUseError: another process trains in the folder; nothing was touched.
        NumericsError: too many steps in a row that are not finite.
    """
    with ExitStack() as held, StopRequest() as stop, open_strategy(config.train) as strategy:
        folder = Path(config.output_dir)
        strategy.lead(lambda: _enter(held, own_folder(folder, activity="train")))
        check_sinks(config.train.logging)
        torch.set_float32_matmul_precision(config.train.matmul_precision)
        seed_everything(config.seed)
        dataset = TokenDataset.open(Path(config.data.output_dir), "train")
        if config.model.vocab_size < dataset.vocab_size:
            raise ConfigError(
                f"model.vocab_size {config.model.vocab_size} is smaller than the {dataset.vocab_size} tokens "
                f"of {dataset.folder}; set model.vocab_size={dataset.vocab_size}"
            )
        model = LanguageModel(config.model, recompute=config.train.recompute, seed=config.seed)
        size = sum(parameter.numel() for parameter in model.parameters())
        start = None
        if config.train.init_from is not None and not list_checkpoints(folder / CHECKPOINTS):
            start = load_start(model, config, dataset)
        stream = TrainingStream(config, dataset, rank=strategy.rank, world_size=strategy.world_size)
        about = {"device": str(strategy.device), "parameters": size, "start": start}
        trainer = Trainer(
            config,
            model,
            stream,
            dataset,
            strategy,
            open_folder=lambda: open_run_folder(config, dataset, resume=resume, **about),
        )
        return trainer.run(stop, evaluators, console=console or Console(quiet=strategy.rank > 0))


def _enter(held: ExitStack, lock: OwnerLock) -> None:
    held.enter_context(lock)


class Trainer:
    """One run in this process.

    strategy: how the model is spread over devices.
    open_folder: makes the run folder or opens it, and returns the identity of the run. Rank 0 calls it after
        everything that may refuse the run, which then leaves nothing behind.
    """

    def __init__(
        self,
        config: RunConfig,
        model: LanguageModel,
        stream: TrainingStream,
        dataset: TokenDataset,
        strategy: Strategy,
        *,
        open_folder: Callable[[], dict[str, Any]],
    ) -> None:
        settings = config.train
        self._config, self._settings, self._strategy = config, settings, strategy
        self._folder = Path(config.output_dir)
        wrapped = strategy.wrap(model)
        self._state = _make_state(config, model, stream, strategy)
        called: nn.Module = torch.compile(wrapped) if settings.compile else wrapped
        parameters = self._state.optimizer.parameters
        self._gradients = GradientComputer(called, parameters, strategy, precision=settings.precision)
        # Evaluation runs the plain model: its shapes and modes would each be compiled again for a few batches.
        self._scoring = GradientComputer(model, parameters, strategy, precision=settings.precision)
        self._total_steps = self._state.stream.total_steps
        self._budget_tokens = self._total_steps * settings.step_tokens
        self._validator: Validator = open_validator(config)
        self._hooks = open_hooks(Parts(config, model, self._state.optimizer, stream, strategy, self._scoring))
        self._state.hooks = self._hooks
        self._identity = strategy.lead(open_folder)
        self._keeper = CheckpointKeeper(self._folder / CHECKPOINTS, config, dataset, strategy, identity=self._identity)
        self._failed_saves = 0

    def run(self, stop: StopRequest, evaluators: Sequence[Evaluator], *, console: Console) -> TrainSummary:
        """Restore the newest checkpoint, then train to the end of the budget or until asked to stop."""
        for note in self._keeper.take_notes():
            console.print(note, markup=False, highlight=False)
        is_resumed = self._keeper.newest is not None
        if is_resumed:
            self._keeper.restore(self._state)
            if self._strategy.lead(self._is_finished):
                console.print(f"{self._folder}: finished at step {self._total_steps}, nothing to do", markup=False)
                return self._summary(None)
        self._recorder = self._open_recorder(console, resume_step=self._state.progress.step if is_resumed else -1)
        try:
            self._start(is_resumed=is_resumed)
            self._loop(stop, evaluators)
            return self._finish(stop)
        finally:
            self._recorder.close()

    def _loop(self, stop: StopRequest, evaluators: Sequence[Evaluator]) -> None:
        """Steps, checkpoints and evaluations, each when it is due; every wait polls for a stop request."""
        progress = self._state.progress
        self._evaluate_if_due(stop, evaluators)  # a run that was ended between checkpoint and evaluation
        while progress.step < self._total_steps and not self._is_asked_to(stop):
            self._step()
            for hook in self._hooks:
                hook.after_step(progress.step)
            if self._state.milestone() is not None:
                self._save()
            elif self._is_due(self._settings.checkpoints.every_tokens):
                self._try_to_save()
            self._evaluate_if_due(stop, evaluators)

    def _step(self) -> None:
        """Take one optimizer step, or skip it when a value is not finite."""
        state, began = self._state, time.perf_counter()
        position = state.stream.state_dict()
        batches = state.stream.next_step()
        gradients = self._gradients.run(batches, after_backward=self._after_backward)
        progress = state.progress
        progress.step += 1
        progress.tokens += self._settings.step_tokens
        multiplier = rate_multiplier(self._settings.schedule, progress.tokens, budget_tokens=self._budget_tokens)
        if gradients.nonfinite is None:
            self._strategy.clip(state.optimizer.parameters.values(), self._settings.clip_norm, norm=gradients.norm)
            for hook in self._hooks:
                hook.before_update(progress.step)
            state.optimizer.step(progress.tokens, multiplier)
            for hook in self._hooks:
                hook.after_update(progress.step)
        seconds = time.perf_counter() - began
        progress.seconds += seconds
        if gradients.nonfinite is None:
            self._recorder.event("step", progress, self._step_fields(gradients, multiplier, seconds))
        else:
            self._skip(gradients.nonfinite, position, batches)

    def _after_backward(self) -> None:
        for hook in self._hooks:
            hook.after_backward()

    def _skip(self, found: NonFinite, position: dict[str, Any], batches: Sequence[Batch]) -> None:
        """Record a step whose values are not finite; its record stands in for the step record."""
        state = self._state
        state.optimizer.skip()
        self._recorder.event(
            "nonfinite",
            state.progress,
            {**found.as_record(), "stream": position},
            note=f"step {state.progress.step} skipped: {found.tensor} is not finite",
        )
        skipped = Skipped(
            state.progress.step,
            found,
            last_good=self._keeper.newest,
            explain=lambda: self._gradients.explain(state.model, batches),
        )
        for hook in self._hooks:
            hook.after_skip(skipped)

    def _step_fields(self, gradients: Gradients, multiplier: float, seconds: float) -> dict[str, Any]:
        """Fields of a step record; statistics of the model come once per logging interval."""
        progress = self._state.progress
        is_logged = progress.step % self._settings.logging.every_steps == 0 or progress.step == self._total_steps
        fields: dict[str, Any] = {
            "loss": gradients.loss,
            "rate": self._settings.optimizer.rate * multiplier,
            "grad_norm": gradients.norm.item(),
            "scored_tokens": gradients.scored_tokens,
            "tokens_per_s": self._settings.step_tokens / seconds,
            "seconds": progress.seconds,
            "memory_mb": peak_memory_mb(self._strategy.device),
        }
        for hook in self._hooks:
            fields |= hook.fields(is_logged=is_logged)
        if is_logged:
            stats = [value.item() for value in gradients.stats.values()]
            means = [total / self._strategy.world_size for total in self._strategy.reduce(stats, "sum")]
            fields |= dict(zip(gradients.stats, means, strict=True))
        # A statistic may overflow while the loss is finite; JSON has no word for that but null.
        return {name: value if math.isfinite(value) else None for name, value in fields.items()}

    def _evaluate_if_due(self, stop: StopRequest, evaluators: Sequence[Evaluator]) -> None:
        """Score the validation batches when due and not done; given up when asked to stop on the way."""
        state, progress = self._state, self._state.progress
        if not self._is_due(self._settings.evaluate_every_tokens) or self._recorder.was_evaluated(progress.step):
            return
        devices = [self._strategy.device] if self._strategy.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # an evaluation that is repeated or left out changes no training
            scores = self._validator.run(
                state.model, self._scoring, self._strategy, is_stopped=lambda: self._is_asked_to(stop)
            )
            if scores is None:
                return
            for evaluator in evaluators:
                scores |= evaluator(state.model, progress.step)
        check_scores(scores, step=progress.step, last_good=self._keeper.newest)
        note = f"step {progress.step}: validation {scores['validation_bpb']:.4f} bits per byte"
        self._recorder.event("eval", progress, {"seconds": progress.seconds, **scores}, note=note)

    def _try_to_save(self) -> None:
        """Write a checkpoint that is due. Training goes on when the disk refuses; the next one that is due tries again.

        Raises:
            CheckpointError: the disk refused `MAX_FAILED_SAVES` times in a row, or at the last step.
            NumericsError: a weight is not finite.
        """
        step = self._state.progress.step
        if step == self._total_steps:
            self._save()
            return
        try:
            self._save()
        except (CheckpointError, DataError) as error:
            self._failed_saves += 1
            if self._failed_saves >= MAX_FAILED_SAVES:
                raise CheckpointError(f"{error}\n  {MAX_FAILED_SAVES} saves in a row failed; the run ends.") from error
            left = MAX_FAILED_SAVES - self._failed_saves
            self._recorder.note(f"step {step} is not saved: {error}\n  Training goes on; {left} more failures end it")
        else:
            self._failed_saves = 0

    def _save(self) -> None:
        """Write a checkpoint of the current step.

        Raises:
            CheckpointError, DataError: the disk refuses; older checkpoints are kept.
        """
        progress, began = self._state.progress, time.perf_counter()
        self._strategy.lead(self._recorder.sync)
        folder = self._keeper.save(self._state)
        for note in self._keeper.take_notes():
            self._recorder.note(note)
        fields = {
            "folder": folder.name,
            "milestone": self._state.milestone(),
            "write_seconds": time.perf_counter() - began,
        }
        self._recorder.event("checkpoint", progress, fields)

    def _start(self, *, is_resumed: bool) -> None:
        """Record how the run begins; a chronological run keeps the model that has seen no period."""
        progress = self._state.progress
        if is_resumed:
            fields = {"commit": current_commit(), "folder": self._keeper.newest.name}
            self._recorder.event("resume", progress, fields, note=f"continuing after step {progress.step}")
        elif self._state.milestone() is not None:
            self._save()

    def _finish(self, stop: StopRequest) -> TrainSummary:
        """Save and record the end, or the stop."""
        progress = self._state.progress
        is_complete = progress.step == self._total_steps and self._recorder.was_evaluated(progress.step)
        saved = self._keeper.newest_step()
        if saved != progress.step:
            self._save()
        if is_complete:
            fields = {"seconds": progress.seconds}
            for hook in self._hooks:
                fields |= hook.summary()
            self._recorder.event("done", progress, fields, note=f"done: {self._folder}")
            return self._summary(None)
        note = f"stopped by {stop.name} after step {progress.step}; `--resume auto` continues from here"
        self._recorder.event("stop", progress, {"signal": stop.name}, note=note)
        return self._summary(stop.name)

    def _is_asked_to(self, stop: StopRequest) -> bool:
        """Whether a signal reached any rank; then all of them stop, for the same reason."""
        names = list(EXIT_CODES)
        asked = int(self._strategy.reduce([names.index(stop.name)], "max")[0])
        if asked:
            stop.set(names[asked])
        return asked > 0

    def _is_due(self, every_tokens: int) -> bool:
        """Whether the last step passed a multiple of `every_tokens`, or was the last of all."""
        progress = self._state.progress
        if progress.step == 0:
            return False
        passed = progress.tokens // every_tokens
        return passed > (progress.tokens - self._settings.step_tokens) // every_tokens or (
            progress.step == self._total_steps
        )

    def _is_finished(self) -> bool:
        """Whether the run reached its end in an earlier call."""
        if self._state.progress.step != self._total_steps:
            return False
        return any(record["event"] == "done" for record in read_records(self._folder / METRICS))

    def _open_recorder(self, console: Console, *, resume_step: int) -> Recorder:
        """Open what records go to, on rank 0; every rank knows which evaluations the log holds."""
        outlets: list[Outlets] = []

        def open_outlets() -> set[int]:
            outlets.append(self._open_outlets(console, resume_step=resume_step))
            return outlets[0].log.evaluated_steps

        evaluated = self._strategy.lead(open_outlets)
        return Recorder(outlets[0] if outlets else None, evaluated=evaluated)

    def _open_outlets(self, console: Console, *, resume_step: int) -> Outlets:
        """Open the log, the sinks that are asked for, and the console."""
        sinks = open_sinks(
            self._settings.logging,
            self._folder,
            resume_step=resume_step,
            identity=self._identity,
            resolved=redact(self._config.model_dump(mode="json")),
        )
        live = TrainConsole(
            self._config.name,
            total_steps=self._total_steps,
            done_steps=max(0, resume_step),
            every_steps=self._settings.logging.every_steps,
            console=console,
        )
        return Outlets(MetricsLog(self._folder / METRICS, resume_step=resume_step), sinks, live)

    def _summary(self, stopped_by: str | None) -> TrainSummary:
        """Describe how the call ended."""
        progress = self._state.progress
        return TrainSummary(self._folder, progress.step, progress.tokens, stopped_by, self._keeper.newest)


def _make_state(config: RunConfig, model: LanguageModel, stream: TrainingStream, strategy: Strategy) -> RunState:
    """Build everything else that changes while the run trains."""
    settings = config.train
    parameters = dict(model.named_parameters())
    groups = plan_groups(parameters, model.parameter_roles(), settings.optimizer)
    clock = LevelClock(config.model.channel.periods)
    restarts = config.model.channel.restarts_levels
    optimizer = ClockedOptimizer(
        parameters, groups, clock, settings.optimizer, restarts=restarts, step_whole=strategy.step_whole
    )
    return RunState(model, optimizer, stream, Progress())
