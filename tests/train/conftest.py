from collections.abc import Callable
from pathlib import Path

import pytest

from nested_lm.config.load import parse_run
from nested_lm.config.run import RunConfig
from nested_lm.train.metrics import read_records

STEP_TOKENS = 32  # context 16, one row, two micro-batches
STEPS = 10
SLOW_STEPS = 4  # period of the slow CMS level

HOPE = {
    "mixer": {"kind": "self_modifying", "num_heads": 2, "head_width": 8, "chunk": 8},
    "channel": {
        "kind": "cms",
        "levels": [
            {"period_tokens": STEP_TOKENS, "expansion": 1.0},
            {"period_tokens": SLOW_STEPS * STEP_TOKENS, "expansion": 1.0},
        ],
    },
}
TRANSFORMER = {
    "mixer": {"kind": "attention", "num_heads": 2},
    "channel": {"kind": "swiglu", "expansion": 2.0},
}
NESTED = HOPE | {
    "channel": {
        "kind": "cms",
        "wiring": "nested",
        "levels": [
            level | {"in_context": {"period_tokens": period, "rate": 0.02, "rule": {"kind": "momentum"}}}
            for level, period in zip(HOPE["channel"]["levels"], (4, 8), strict=True)
        ],
        "in_context": {"lifetime": "document", "meta_gradient": "first_order"},
    }
}
MODELS = {"hope": HOPE, "transformer": TRANSFORMER, "nested": NESTED}


@pytest.fixture
def make_config(tmp_path, tiny_data) -> Callable[..., RunConfig]:
    """Configurations of tiny runs: `make_config("hope", folder="a", budget_tokens=64, ...)`."""

    def make(model: str = "transformer", *, folder: str = "run", seed: int = 3, **train) -> RunConfig:
        settings = {
            "budget_tokens": STEPS * STEP_TOKENS,
            "context_length": 16,
            "batch_size": 1,
            "accumulation": 2,
            "optimizer": {"kind": "adamw", "rate": 1e-2},
            "schedule": {"kind": "cosine", "warmup_tokens": 2 * STEP_TOKENS},
            "evaluate_every_tokens": 5 * STEP_TOKENS,
            "evaluate_tokens": 64,
            "checkpoints": {"every_tokens": 3 * STEP_TOKENS},
            "logging": {"every_steps": 2},
            "device": "cpu",
        }
        return parse_run(
            {
                "name": "tiny",
                "output_dir": str(tmp_path / folder),
                "seed": seed,
                "data": tiny_data.config.model_dump(mode="json"),
                "model": {"vocab_size": 320, "width": 16, "num_layers": 2, **MODELS[model]},
                "train": settings | train,
                "eval": {},
            },
            "test",
        )

    return make


@pytest.fixture(scope="session")
def records() -> Callable[..., list[dict]]:
    """Read the records of a run's log, of the named events or of all."""

    def read(folder: str | Path, *events: str) -> list[dict]:
        rows = read_records(Path(folder) / "metrics.jsonl")
        return [row for row in rows if not events or row["event"] in events]

    return read


@pytest.fixture(scope="session")
def comparable(records) -> Callable[[str | Path], list[dict]]:
    """Read what a log says about learning: without times and memory, which no two runs share."""
    unequal = {"seconds", "tokens_per_s", "memory_mb", "write_seconds"}

    def read(folder: str | Path) -> list[dict]:
        rows = records(folder, "step", "eval")
        return [{key: value for key, value in row.items() if key not in unequal} for row in rows]

    return read


@pytest.fixture(scope="session")
def final_bytes() -> Callable[[str | Path], dict[str, bytes]]:
    """Read the bytes of the weights and the optimizer state in the newest checkpoint."""

    def read(folder: str | Path) -> dict[str, bytes]:
        newest = max((Path(folder) / "checkpoints").glob("step-*"))
        return {"step": newest.name.encode()} | {
            name: (newest / f"{name}.safetensors").read_bytes() for name in ("model", "optimizer")
        }

    return read
