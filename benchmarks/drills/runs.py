"""A run of a second: a Hope model of two levels on a few hundred words, and what is compared between two of them."""

import json
import random
from pathlib import Path

from rich.console import Console

from nested_lm.checkpoint import list_checkpoints, newest_checkpoint
from nested_lm.config.data import DataConfig
from nested_lm.config.load import parse_run
from nested_lm.config.run import RunConfig
from nested_lm.data.pipeline import build
from nested_lm.train.metrics import read_records
from nested_lm.train.run_folder import CHECKPOINTS, METRICS
from nested_lm.train.trainer import train

STEPS, STEP_TOKENS = 12, 32
VOCABULARY = "the union of these states shall keep its army and navy in peace while congress reads"
_TIMES = {"seconds", "tokens_per_s", "memory_mb", "write_seconds"}


def make_data(folder: Path) -> DataConfig:
    """Build a data set of 60 short documents."""
    rng = random.Random(1)
    words = VOCABULARY.split()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "documents.jsonl").open("w") as file:
        for index in range(60):
            text = " ".join(rng.choices(words, k=rng.choice([5, 20, 60])))
            file.write(json.dumps({"text": f"{text} {index}."}) + "\n")
    config = DataConfig(
        name="drill",
        output_dir=str(folder / "built"),
        source={"kind": "folder", "path": str(folder / "documents.jsonl")},
        tokenizer={"kind": "byte_bpe", "vocab_size": 300},
        split={"train": 0.6, "validation": 0.2, "test": 0.2},
    )
    build(config, report=lambda _: None)
    return config


def make_run(folder: Path, data: DataConfig, *, every_steps: int = 3) -> RunConfig:
    """Configure a run of `STEPS` steps with a checkpoint every few."""
    levels = [{"period_tokens": periods * STEP_TOKENS, "expansion": 1.0} for periods in (1, 4)]
    return parse_run(
        {
            "name": "drill",
            "output_dir": str(folder),
            "seed": 3,
            "data": data.model_dump(mode="json"),
            "model": {
                "vocab_size": 300,
                "width": 16,
                "num_layers": 1,
                "mixer": {"kind": "self_modifying", "num_heads": 2, "head_width": 8, "chunk": 8},
                "channel": {"kind": "cms", "levels": levels},
            },
            "train": {
                "budget_tokens": STEPS * STEP_TOKENS,
                "context_length": 16,
                "batch_size": 2,
                "optimizer": {"kind": "adamw", "rate": 1e-2},
                "schedule": {"kind": "cosine", "warmup_tokens": STEP_TOKENS},
                "evaluate_every_tokens": 6 * STEP_TOKENS,
                "evaluate_tokens": 64,
                "checkpoints": {"every_tokens": every_steps * STEP_TOKENS},
                "device": "cpu",
            },
            "eval": {},
        },
        "the drill",
    )


def run_once(config: RunConfig) -> None:
    """Train to the end without a word."""
    train(config, console=Console(quiet=True))


def committed_step(config: RunConfig) -> int:
    """Step of the newest whole checkpoint; 0 when there is none."""
    newest = newest_checkpoint(Path(config.output_dir) / CHECKPOINTS)
    return 0 if newest is None else int(newest.name[5:])


def differences(config: RunConfig, whole: RunConfig) -> list[str]:
    """What differs between a finished run and one that nothing happened to: weights, optimizer, log, leftovers."""
    mine, other = (Path(each.output_dir) for each in (config, whole))
    found = []
    newest, wanted = (list_checkpoints(folder / CHECKPOINTS)[-1] for folder in (mine, other))
    if newest.name != wanted.name:
        return [f"ended at {newest.name}, not {wanted.name}"]
    for name in ("model", "optimizer"):
        if (newest / f"{name}.safetensors").read_bytes() != (wanted / f"{name}.safetensors").read_bytes():
            found.append(f"other {name}")
    logs = [
        [{k: v for k, v in row.items() if k not in _TIMES} for row in read_records(folder / METRICS) if _learns(row)]
        for folder in (mine, other)
    ]
    if logs[0] != logs[1]:
        found.append("another log")
    if left := [path.name for path in mine.rglob(".tmp-*")] + [path.name for path in mine.glob("lock")]:
        found.append(f"left {', '.join(left)}")
    return found


def _learns(row: dict[str, object]) -> bool:
    return row["event"] in ("step", "eval")
