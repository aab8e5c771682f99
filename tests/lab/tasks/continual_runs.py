"""Tiny chronological runs that the tests of continual learning share."""

from pathlib import Path

from nested_lm.config.load import parse_run
from nested_lm.config.run import RunConfig
from nested_lm.train.trainer import train

STEP_TOKENS = 32
PERIODS = 3
STEPS = 16  # of a period
LEVELS = (STEP_TOKENS, 2 * STEP_TOKENS, 4 * STEP_TOKENS)

MODELS = {
    "hope": {
        "mixer": {"kind": "self_modifying", "num_heads": 2, "head_width": 8, "chunk": 8},
        "channel": {"kind": "cms", "levels": [{"period_tokens": period, "expansion": 1.0} for period in LEVELS]},
    },
    "in_context": {
        "mixer": {"kind": "self_modifying", "num_heads": 2, "head_width": 8, "chunk": 4},
        "channel": {
            "kind": "cms",
            "levels": [
                {
                    "period_tokens": STEP_TOKENS,
                    "expansion": 1.0,
                    "in_context": {"period_tokens": period, "rate": 0.02, "rule": {"kind": "gd"}},
                }
                for period in (4, 8)
            ],
            "in_context": {"lifetime": "document", "meta_gradient": "first_order"},
        },
    },
    "transformer": {"mixer": {"kind": "attention", "num_heads": 2}, "channel": {"kind": "swiglu", "expansion": 2.0}},
}


def config_of(data, folder: Path, *, model: str = "hope", seed: int = 3, stream=None, **train_settings) -> RunConfig:
    """Configuration of a run of 48 steps."""
    return parse_run(
        {
            "name": folder.name,
            "output_dir": str(folder),
            "seed": seed,
            "data": data.model_dump(mode="json"),
            "model": {"vocab_size": 320, "width": 16, "num_layers": 1, **MODELS[model]},
            "train": {
                "budget_tokens": PERIODS * STEPS * STEP_TOKENS,
                "context_length": 16,
                "batch_size": 2,
                "stream": stream or {"kind": "chronological", "periods": PERIODS},
                "optimizer": {"kind": "adamw", "rate": 3e-2},
                "schedule": {"kind": "cosine", "warmup_tokens": 64},
                "evaluate_every_tokens": 10_000_000,
                "evaluate_tokens": 64,
                "checkpoints": {"every_tokens": 10_000_000},
                "logging": {"every_steps": 48},
                "device": "cpu",
                **train_settings,
            },
            "eval": {"batch_size": 4, "bootstrap_samples": 100},
        },
        "test",
    )


def trained(data, folder: Path, **settings) -> Path:
    """Train one and return its folder."""
    train(config_of(data, folder, **settings))
    return folder
