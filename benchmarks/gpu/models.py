"""The models that are timed and trained: presets of the pilot, or of one tiny layer for a rehearsal."""

import torch

from nested_lm.config.load import load_run
from nested_lm.config.model import ModelConfig
from nested_lm.nn.model import LanguageModel

PRESETS = {
    "Hope": "hope/pilot",
    "Titans LMM": "baselines/titans_lmm_pilot",
    "Gated DeltaNet": "baselines/gated_delta_net_pilot",
    "DeltaNet": "baselines/delta_net_pilot",
    "Transformer++": "baselines/transformer_pilot",
}


def configured(name: str, *, layers: int | None, tiny: bool) -> ModelConfig:
    """A preset's model, with fewer layers where that is asked for, or everything tiny."""
    preset = PRESETS[name].replace("pilot", "demo") if tiny else PRESETS[name]
    changes = [] if layers is None else [f"model.num_layers={layers}"]
    if tiny:
        changes = ["model.num_layers=1"]
        if name == "Hope":  # the others would take minutes in the interpreter
            changes += ["model.mixer.num_heads=1", "model.mixer.backend=triton"]
    config: ModelConfig = load_run(preset, changes).model
    return config


def built(config: ModelConfig, device: torch.device) -> LanguageModel:
    """A model with its starting weights."""
    torch.manual_seed(0)
    model = LanguageModel(config)
    model.initialise(0)
    return model.to(device)


def takes(tokens: int, config: ModelConfig) -> int:
    """Round a length up to the borders of the model's memories."""
    step: int = config.mixer.alignment
    return -(-tokens // step) * step
