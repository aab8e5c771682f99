"""The models of the learning suite: two layers of width 32, two heads, parameters within two per cent."""

from typing import Any

from nested_lm.config.model import ModelConfig
from nested_lm.nn.sizing import count_parameters

WIDTH, LAYERS = 32, 2

HEAD = {"num_heads": 2, "head_width": 16}

MEMORY = {"kind": "self_modifying", **HEAD, "chunk": 8}
"""Chunks that the short training sequences cross several times, so that reading from written generators is trained."""

MIXERS: dict[str, dict[str, Any]] = {
    "hope": MEMORY,
    "hope_flat": {**MEMORY, "flat_gates": ["output", "rate", "decay"]},
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
    "hope_flat": 64,
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


def configuration(arm: str, vocab: int, *, head_width: int = HEAD["head_width"]) -> ModelConfig:
    """Build one arm's model. Wider heads make wider models, whose MLPs are as wide as Hope's parameters allow."""
    config = _configuration(arm, vocab, head_width, HIDDEN_WIDTH[arm] * head_width // HEAD["head_width"])
    if head_width == HEAD["head_width"] or arm == "hope":
        return config
    missing = _parameters(configuration("hope", vocab, head_width=head_width)) - _parameters(config)
    hidden = round(config.channel.expansion * config.width) + round(missing / (3 * config.width * LAYERS))
    return _configuration(arm, vocab, head_width, hidden)


def _configuration(arm: str, vocab: int, head_width: int, hidden: int) -> ModelConfig:
    width = WIDTH * head_width // HEAD["head_width"]
    mixer = MIXERS[arm] | ({"head_width": head_width} if "head_width" in MIXERS[arm] else {})
    return ModelConfig.model_validate(
        {
            "vocab_size": vocab,
            "width": width,
            "num_layers": LAYERS,
            "mixer": mixer,
            "channel": {"kind": "swiglu", "expansion": hidden / width},
            "tie_embeddings": False,
            "init_std": 0.3,
        }
    )


def _parameters(config: ModelConfig) -> int:
    return count_parameters(config)["total"]
