"""Small models of every mixer, and of levels that are written in context, with vocabulary 61."""

import torch

from nested_lm.config.model import ModelConfig
from nested_lm.nn.model import LanguageModel
from nested_lm.reading.identity import identify
from nested_lm.reading.stream import Boundary

BOUNDARY = Boundary(start=0, end=0)
MIB = 1 << 20

_SWIGLU = {"kind": "swiglu", "expansion": 2.0}
_HOPE = {"kind": "self_modifying", "num_heads": 2, "head_width": 6, "chunk": 4}
_TITANS = _HOPE | {
    "adapt": ["memory"],
    "targets": "values",
    "erase": "none",
    "momentum": "sum",
    "rates": {"memory": 0.1},
}
_HYBRID = {"num_heads": 2, "num_persistent": 2, "memory": _TITANS}


def _levels(period, rule):
    return {
        "kind": "cms",
        "levels": [
            {
                "period_tokens": 64,
                "expansion": 1.5,
                "in_context": {"period_tokens": period, "rate": 0.05, "rule": rule},
            },
            {
                "period_tokens": 128,
                "expansion": 1.0,
                "in_context": {"period_tokens": 2 * period, "rate": 0.05, "rule": rule},
            },
        ],
        "in_context": {"lifetime": "stream", "meta_gradient": "first_order"},
    }


PARTS = {
    "hope": (_HOPE, {"kind": "cms", "levels": [{"period_tokens": 64, "expansion": 1.5}]}),
    "hope_linear": (_HOPE | {"depth": 1, "normalise": False}, _SWIGLU),
    "hope_in_context": (_HOPE, _levels(8, {"kind": "momentum", "inertia": 0.5})),
    "attention_in_context": ({"kind": "attention", "num_heads": 2}, _levels(4, {"kind": "adam"})),
    "titans_lmm": (_TITANS, _SWIGLU),
    "titans_mac": ({"kind": "titans_mac", "segment": 8} | _HYBRID, _SWIGLU),
    "titans_mag": ({"kind": "titans_mag", "window": 8} | _HYBRID, _SWIGLU),
    "titans_mal": ({"kind": "titans_mal", "window": 8} | _HYBRID, _SWIGLU),
    "transformer": ({"kind": "attention", "num_heads": 2}, _SWIGLU),
    "sliding_window": ({"kind": "attention", "num_heads": 2, "window": 8}, _SWIGLU),
    "linear_attention": ({"kind": "linear_attention", "num_heads": 2, "head_width": 6}, _SWIGLU),
    "delta_net": ({"kind": "delta_net", "num_heads": 2, "head_width": 6}, _SWIGLU),
    "gated_delta_net": (
        {"kind": "gated_delta_net", "num_heads": 2, "head_width": 6, "value_expansion": 2.0},
        _SWIGLU,
    ),
}


def build(name, dtype=torch.float64, seed=0, **changes):
    mixer, channel = PARTS[name]
    settings = {"vocab_size": 61, "width": 12, "num_layers": 2, "mixer": mixer, "channel": channel} | changes
    model = LanguageModel(ModelConfig.model_validate(settings))
    model.initialise(seed)
    with torch.no_grad():
        model.embedding.weight.mul_(20.0)  # predictions that depend strongly on what was read
    return model.to(dtype).eval()


@torch.no_grad()
def overflowing(name, *, layer):
    """A model with finite weights and one mixer whose outputs are beyond float32."""
    model = build(name, torch.float32)
    model.blocks[layer].mixer.output_gate.weight.mul_(1e30)
    model.blocks[layer].mixer.out.weight.mul_(1e30)
    return model


def identity_of(model, tokenizer="t" * 64):
    return identify(model, tokenizer_hash=tokenizer, label="a run, step 3")


def tokens(*shape, seed=0):
    return torch.randint(1, 61, shape, generator=torch.Generator().manual_seed(seed))


def documents(*lengths, seed=0):
    return [tokens(length, seed=seed + index).numpy() for index, length in enumerate(lengths)]
