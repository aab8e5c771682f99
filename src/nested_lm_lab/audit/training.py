"""Training: equal seeds make equal runs, a resumed run is the run, the first loss is that of knowing nothing."""

import contextlib
import io
import math
import random
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from nested_lm.checkpoint import newest_checkpoint, read_document, read_tensors
from nested_lm.config.data import DataConfig
from nested_lm.config.load import parse_run
from nested_lm.config.run import RunConfig
from nested_lm.data.pipeline import build as build_data
from nested_lm.nn.model import LanguageModel
from nested_lm.optim.clocked import ClockedOptimizer
from nested_lm.optim.groups import plan_groups
from nested_lm.optim.level_clock import LevelClock
from nested_lm.train.trainer import train
from nested_lm_lab.audit.finding import Finding, at_least, at_most, between
from nested_lm_lab.audit.probe import next_token_loss
from nested_lm_lab.audit.subject import Subject

VOCABULARY = 300
"""Tokens of the small data set that runs are tried on."""

FIRST_LOSS = 0.05
"""Nats per token around the loss that independent normal logits of the initial size have."""

NEAR_UNIFORM = 0.5
"""Nats per token around the logarithm of the vocabulary."""


class _Stopped(Exception):  # noqa: N818  it reports no error
    """Ends a run in the middle, as a kill does."""


def level_ratios(run: RunConfig) -> tuple[int, ...]:
    """Steps between two updates of each level, small enough to see several: 1, 2, 4, ... in the run's order.

    Levels of equal periods stay equal; the fastest is 1 where it is updated at every step.
    """
    periods = sorted(set(run.model.channel.periods))
    if not periods:
        return ()
    first = 1 if periods[0] <= run.train.step_tokens else 2
    ratios = {period: first * 2**index for index, period in enumerate(periods)}
    return tuple(ratios[period] for period in run.model.channel.periods)


def make_optimizer(run: RunConfig, model: LanguageModel, ratios: tuple[int, ...]) -> ClockedOptimizer:
    """Make the run's optimizer for a model; one step counts as one token on the clocks of the levels."""
    parameters = dict(model.named_parameters())
    settings = run.train.optimizer
    if len(ratios) != len(run.model.channel.periods):  # a variant with other levels
        settings = settings.model_copy(update={"levels": ()}) if hasattr(settings, "levels") else settings
    groups = plan_groups(parameters, model.parameter_roles(), settings)
    restarts = model.config.channel.restarts_levels
    return ClockedOptimizer(parameters, groups, LevelClock(ratios), settings, restarts=restarts)


def seeds(subject: Subject) -> list[Finding]:
    """Build and train twice with one seed: equal bits. Another seed: other weights."""
    first, second = (_two_steps(subject) for _ in range(2))
    unequal = sum(not torch.equal(first[name], second[name]) for name in first)
    drawn = [LanguageModel(subject.config) for _ in range(3)]
    for model, seed in zip(drawn, (subject.run.seed, subject.run.seed, subject.run.seed + 1), strict=True):
        model.initialise(seed)
    one, same, other = ([parameter for parameter in model.parameters() if parameter.ndim > 1] for model in drawn)
    differing = sum(not torch.equal(a, b) for a, b in zip(one, same, strict=True))
    fresh = sum(not torch.equal(a, b) for a, b in zip(one, other, strict=True))
    return [
        at_most("tensors that differ between two builds of one seed", differing, 0),
        at_least("tensors that differ between builds of two seeds", fresh, 1),
        at_most("tensors that differ after two training steps of one seed", unequal, 0),
    ]


def _two_steps(subject: Subject) -> dict[str, torch.Tensor]:
    model = subject.build(dtype=torch.float32)
    optimizer = make_optimizer(subject.run, model, level_ratios(subject.run))
    for step in (1, 2):
        next_token_loss(model, subject.random_tokens(2, subject.length, seed=step)).backward()
        optimizer.step(step, 0.1)
    return {**model.state_dict(), **optimizer.state_tensors()}


@torch.no_grad()
def initial_loss(subject: Subject) -> list[Finding]:
    """Loss of fresh weights: that of logits which are normal with the size the initialisation gives them.

    Their mean loss is ln V + s^2 / 2, s^2 = width x init_std^2: the head reads vectors of unit root mean square.
    """
    config = subject.config
    model = LanguageModel(config)
    model.initialise(subject.run.seed)
    model.to(subject.device)
    loss = next_token_loss(model, subject.random_tokens(8, subject.length)).item()
    uniform = math.log(config.vocab_size)
    expected = uniform + config.width * config.init_std**2 / 2
    asked = subject.run.model
    at_size = asked.width * asked.init_std**2 / 2
    return [
        at_most(
            f"loss of fresh weights ({loss:.3f}) beside ln V + s^2/2 ({expected:.3f})", abs(loss - expected), FIRST_LOSS
        ),
        between("loss of fresh weights minus ln V", loss - uniform, -FIRST_LOSS, NEAR_UNIFORM),
        at_most("s^2/2 at the width that was asked for", at_size, NEAR_UNIFORM),
    ]


def resume(subject: Subject) -> list[Finding]:
    """Train a few steps through the real trainer, in one go and with a stop in the middle: equal bits at the end.

    The data set, a few pages of random words, is made in a temporary folder. The run has the preset's optimizer,
    precision and stream state, a context of one or two chunks, and stops in the middle of a level's period.
    """
    with tempfile.TemporaryDirectory(prefix="nested-lm-audit-") as name:
        folder = Path(name)
        data = _small_data(folder)
        whole = _small_run(subject, data, folder / "whole")
        parted = whole.model_copy(update={"output_dir": str(folder / "parted")})
        stop = max(1, whole.train.num_steps // 2 - (1 if whole.train.num_steps > 4 else 0))
        train(whole, console=_nowhere())
        with contextlib.suppress(_Stopped):
            train(parted, console=_nowhere(), evaluators=[_stopping_at(stop)])
        reached = _read(parted)["step"]
        train(parted, console=_nowhere())
        one, two = _read(whole), _read(parted)
    unequal = sorted(key for key in one | two if not _equal(one.get(key), two.get(key)))
    return [
        between("step at which the parted run was killed", reached, stop, stop),
        between("steps of the resumed run", two["step"], whole.train.num_steps, whole.train.num_steps),
        at_most("tensors that differ between the whole and the resumed run", len(unequal), 0, ", ".join(unequal[:3])),
    ]


def _stopping_at(step: int) -> Any:
    def evaluator(_model: LanguageModel, at: int) -> Mapping[str, float]:
        if at == step:
            raise _Stopped
        return {}

    return evaluator


def _nowhere() -> Console:
    return Console(file=io.StringIO())


def _read(run: RunConfig) -> dict[str, Any]:
    """Tensors and step of a run's newest checkpoint."""
    newest = newest_checkpoint(Path(run.output_dir) / "checkpoints")
    assert newest is not None
    document = read_document(newest, "train_state.json")
    named = {f"{stem}/{name}": t for stem in ("model", "optimizer") for name, t in read_tensors(newest, stem).items()}
    return {"step": document["step"], "stream": document["stream"], **named}


def _equal(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        return torch.equal(one, two)
    return bool(one == two)


def _small_data(folder: Path) -> DataConfig:
    """Build a data set of random words."""
    draw = random.Random(7)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(1, 7))) for _ in range(120)]
    source = folder / "text"
    source.mkdir()
    for index in range(40):
        text = " ".join(draw.choices(words, k=draw.randint(20, 160))) + f" {index}.\n"
        (source / f"{index:02}.txt").write_text(text, encoding="utf-8")
    config = DataConfig(
        name="audit",
        output_dir=str(folder / "data"),
        source={"kind": "folder", "path": str(source)},
        tokenizer={"kind": "byte_bpe", "vocab_size": VOCABULARY},
        split={"train": 0.7, "validation": 0.2, "test": 0.1},
    )
    build_data(config, report=lambda _: None)
    return config


def _small_run(subject: Subject, data: DataConfig, folder: Path) -> RunConfig:
    """The audited run with a budget of a few steps and a checkpoint after each."""
    context = subject.config.alignment * -(-32 // subject.config.alignment)
    written = [writes.period_tokens for writes in subject.config.channel.writes if writes is not None]
    context = max(context, 2 * min(written, default=1))
    ratios = level_ratios(subject.run)
    steps = max(4, max(ratios, default=1) + 2)
    model = subject.config.model_dump(mode="json")
    model["vocab_size"] = max(VOCABULARY, subject.config.vocab_size)
    for level, ratio in zip(model["channel"].get("levels", ()), ratios, strict=False):
        level["period_tokens"] = ratio * context
    settings = subject.run.train.model_dump(mode="json")
    schedule = {"warmup_tokens": context} | ({"decay_tokens": context} if settings["schedule"]["kind"] == "wsd" else {})
    settings |= {
        "budget_tokens": steps * context,
        "context_length": context,
        "batch_size": 1,
        "accumulation": 1,
        "stream": {"kind": "shuffled"},
        "schedule": settings["schedule"] | schedule,
        "compile": False,
        "device": subject.device.type,
        "evaluate_every_tokens": context,
        "evaluate_tokens": context,
        "checkpoints": {"every_tokens": context},
        "logging": {"every_steps": 1},
    }
    return parse_run(
        {
            "name": "audit",
            "output_dir": str(folder),
            "seed": subject.run.seed,
            "data": data.model_dump(mode="json"),
            "model": model,
            "train": settings,
            "eval": {},
        },
        "the audit's run",
    )
