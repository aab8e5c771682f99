"""Exact parameter counts from the configuration alone, by building the model on the meta device."""

import torch

from nested_lm.config.model import ModelConfig
from nested_lm.nn.model import LanguageModel


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Count parameters by part: embedding, mixer, memory_starts, channel, norms, total. A tied head counts once."""
    with torch.device("meta"):
        model = LanguageModel(config)
    counts = {"embedding": 0, "mixer": 0, "memory_starts": 0, "channel": 0, "norms": 0}
    roles = model.parameter_roles()
    for name, parameter in model.named_parameters():
        if roles[name].kind == "embedding":
            part = "embedding"
        elif roles[name].kind == "memory":
            part = "memory_starts"
        elif ".mixer." in name:
            part = "mixer"
        elif ".channel." in name:
            part = "channel"
        else:
            part = "norms"
        counts[part] += parameter.numel()
    return counts | {"total": sum(counts.values())}
