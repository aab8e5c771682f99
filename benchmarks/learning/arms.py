"""The models of the learning suite: two layers of width 32, two heads, parameters within two per cent."""

from typing import Any

from nested_lm.config.model import ModelConfig

WIDTH, LAYERS = 32, 2

HEAD = {"num_heads": 2, "head_width": 16}

MEMORY = {"kind": "self_modifying", **HEAD, "chunk": 8}
"""Chunks that the short training sequences cross several times, so that reading from written generators is trained."""

MIXERS: dict[str, dict[str, Any]] = {
    "hope": MEMORY,
    "hope_memory_only": {**MEMORY, "adapt": ["memory"]},
    "transformer": {"kind": "attention", "num_heads": 2},
    "sliding_window": {"kind": "attention", "num_heads": 2, "window": 16},
    "linear_attention": {"kind": "linear_attention", **HEAD, "feature_map": "identity"},
    "linear_attention_conv": {
        **MEMORY,
        "adapt": ["memory"],
        "depth": 1,
        "objective": "dot",
        "targets": "values",
        "erase": "none",
        "retention": "full",
        "rates": {"memory": 1.0},
        "rate_init": 0.2,
        "rate_stretch": 0.0,
    },
    "delta_net": {"kind": "delta_net", **HEAD},
    "delta_net_negative": {"kind": "delta_net", **HEAD, "rate_max": 2.0},
    "gated_delta_net": {"kind": "gated_delta_net", **HEAD},
    "titans_lmm": {
        **MEMORY,
        "adapt": ["memory"],
        "targets": "values",
        "erase": "none",
        "momentum": "sum",
        "rates": {"memory": 0.1},
        "rate_init": 0.5,
        "rate_stretch": 0.0,
    },
}
"""Arm -> mixer; everything else is the same for all."""


HIDDEN_WIDTH: dict[str, int] = {
    "hope": 64,
    "hope_memory_only": 107,
    "transformer": 134,
    "sliding_window": 134,
    "linear_attention": 134,
    "linear_attention_conv": 113,
    "delta_net": 129,
    "delta_net_negative": 129,
    "gated_delta_net": 84,
    "titans_lmm": 107,
}
"""Arm -> hidden width of its MLPs, with which it has as many parameters as Hope."""


def configuration(arm: str, vocab: int) -> ModelConfig:
    """Build one arm's model."""
    return ModelConfig.model_validate(
        {
            "vocab_size": vocab,
            "width": WIDTH,
            "num_layers": LAYERS,
            "mixer": MIXERS[arm],
            "channel": {"kind": "swiglu", "expansion": HIDDEN_WIDTH[arm] / WIDTH},
            "tie_embeddings": False,
            "init_std": 0.3,
        }
    )
