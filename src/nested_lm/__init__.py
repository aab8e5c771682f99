"""nested-lm: Hope language models, whose fast weights go on learning while they read.

Layers for networks of your own, `y, state = layer(x)` (docs/layers.md):

- `SelfModifyingTitans`, `TitansMemory`: memories that are written while they are read.
- `GatedDeltaNet`, `DeltaNet`, `LinearAttention`, `Attention`: what they are compared with.
- `ContinuumMemory`: residual MLPs, each updated on its own clock. `HopeBlock`: both parts of Hope in one block.

A whole model: `LanguageModel`, which `ModelConfig` describes. `load` gives a trained one with its tokenizer and
a memory (docs/streaming.md).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nested_lm.config.model import ModelConfig
    from nested_lm.nn.drop_in import (
        Attention,
        ContinuumMemory,
        DeltaNet,
        GatedDeltaNet,
        HopeBlock,
        LinearAttention,
        SelfModifyingTitans,
        TitansMemory,
    )
    from nested_lm.nn.model import LanguageModel
    from nested_lm.reading.trained import load

__version__ = "0.1.0.dev0"

__all__ = [
    "Attention",
    "ContinuumMemory",
    "DeltaNet",
    "GatedDeltaNet",
    "HopeBlock",
    "LanguageModel",
    "LinearAttention",
    "ModelConfig",
    "SelfModifyingTitans",
    "TitansMemory",
    "load",
]

_HOMES = {
    "LanguageModel": "nested_lm.nn.model",
    "ModelConfig": "nested_lm.config.model",
    "load": "nested_lm.reading.trained",
}
"""Modules of the names above; all others are in `nn/drop_in.py`. They are imported when asked for: torch is slow."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOMES.get(name, "nested_lm.nn.drop_in")), name)
