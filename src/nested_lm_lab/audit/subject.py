"""What is audited: a preset's model with fresh weights, or the model of a checkpoint."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from nested_lm.checkpoint import load_model, newest_checkpoint
from nested_lm.config.load import load_run
from nested_lm.config.model import ModelConfig
from nested_lm.config.run import RunConfig
from nested_lm.errors import CheckpointError, ConfigError
from nested_lm.nn.model import LanguageModel
from nested_lm.nn.sizing import count_parameters
from nested_lm_lab.audit.shrink import SMALL_PARAMETERS, SMALL_SPAN, shrink, span

TOKEN_SEED = 20
"""Of the random tokens that the checks read."""


@dataclass(frozen=True)
class Subject:
    """A model to audit, and how it came about.

    source: what the user named.
    run: its configuration as asked for.
    config: the model that is audited; smaller than `run.model` where `shrunk` says so.
    shrunk: each changed setting.
    weights: of a checkpoint, on the CPU; None for fresh weights drawn with the run's seed.
    step, tokens: of training, for a checkpoint.
    device: where the checks compute.
    """

    source: str
    run: RunConfig
    config: ModelConfig
    device: torch.device
    shrunk: tuple[str, ...] = ()
    weights: Mapping[str, Tensor] | None = None
    step: int | None = None
    tokens: int | None = None

    def build(self, config: ModelConfig | None = None, *, dtype: torch.dtype = torch.float64) -> LanguageModel:
        """Build the audited model, or one of another configuration with the same values where both have them.

        Each call makes a model of its own; the same call makes the same numbers.
        """
        model = LanguageModel(config or self.config)
        model.initialise(self.run.seed)
        if config is not None:
            copy_parameters(self.build(dtype=torch.float32).cpu(), model)
        elif self.weights is not None:
            model.load_state_dict(dict(self.weights), strict=True)
        return model.to(self.device, dtype)

    @property
    def length(self) -> int:
        """Tokens that the checks of streams read: past two of the model's longest chunks, and not a multiple."""
        return 2 * span(self.config) + 13

    def random_tokens(self, rows: int, length: int, *, seed: int = TOKEN_SEED) -> Int[Tensor, "B T"]:
        """Draw tokens, each independent of the others."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, self.config.vocab_size, (rows, length), generator=generator).to(self.device)


@torch.no_grad()
def copy_parameters(source: LanguageModel, target: LanguageModel) -> None:
    """Copy every value that both models have: parameters by name, starts of memories by the memory's name.

    What only the target has keeps the value it has.
    """
    theirs = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        value = theirs.get(name)
        if value is None:
            continue
        if value.shape == parameter.shape:
            parameter.copy_(value)
        elif name.endswith(("mixer.start_inner", "mixer.start_outer", "mixer.gain")):
            layer = int(name.split(".")[1])
            old, new = (model.blocks[layer].mixer.rule.adapt for model in (source, target))
            if value[:, 0].shape == parameter[:, 0].shape:  # memories of another depth have nothing in common
                for memory in set(old) & set(new):
                    parameter[:, new.index(memory)] = value[:, old.index(memory)]
        elif value.shape[1:] == parameter.shape[1:]:  # such as gates, of which one may have more
            rows = min(len(value), len(parameter))
            parameter[:rows] = value[:rows]


def open_subject(source: str, overrides: Sequence[str], *, device: torch.device) -> Subject:
    """Find what the user named: a checkpoint, a run folder (its newest checkpoint), or a preset.

    Args:
        source: path or preset name.
        overrides: changes to a preset.

    Raises:
        ConfigError: an unknown or wrong preset, or overrides for a checkpoint.
        CheckpointError: a damaged checkpoint, or a folder without one.
    """
    if Path(source).is_dir():
        if overrides:
            raise ConfigError(
                f"{source} is a trained model, whose configuration is stored with it; leave "
                f"{' '.join(overrides)} out, or name a preset"
            )
        return _of_checkpoint(Path(source), device)
    run = load_run(source, overrides)
    config, changes = run.model, ()
    if count_parameters(config)["total"] > SMALL_PARAMETERS or span(config) > SMALL_SPAN:
        config, changes = shrink(config)
    return Subject(source, run, config, device, shrunk=changes)


def _of_checkpoint(path: Path, device: torch.device) -> Subject:
    checkpoint: Path | None = path
    if not (path / "manifest.json").is_file():
        checkpoint = newest_checkpoint(path / "checkpoints")
    if checkpoint is None:
        raise CheckpointError(
            f"{path} is neither a checkpoint nor a run folder with a valid one below checkpoints/; "
            "train the run first: `nested-lm train`"
        )
    loaded = load_model(checkpoint, device="cpu")
    return Subject(
        str(checkpoint),
        loaded.config,
        loaded.config.model,
        device,
        weights=loaded.model.state_dict(),
        step=loaded.step,
        tokens=loaded.tokens,
    )
