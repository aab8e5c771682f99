"""Training with levels that are written while the model reads."""

import math

from nested_lm.config.load import load_run, parse_run
from nested_lm.train.trainer import train


def test_the_preset_trains_and_writes(tmp_path, tiny_data, records):
    run = load_run(
        "hope/demo_in_context",
        [
            f"output_dir={tmp_path / 'run'}",
            "train.budget_tokens=256",  # four steps of one row
            "train.context_length=64",
            "train.batch_size=1",
            "train.schedule.warmup_tokens=64",
            "train.schedule.decay_tokens=64",
            "train.evaluate_every_tokens=128",
            "train.evaluate_tokens=64",
            "train.checkpoints.every_tokens=128",
            "train.logging.every_steps=1",
            "train.device=cpu",
            "model.vocab_size=320",
        ],
    )
    settings = run.model_dump(mode="json") | {"data": tiny_data.config.model_dump(mode="json")}
    summary = train(parse_run(settings, "test"))
    steps = records(summary.folder, "step")
    assert len(steps) == 4
    for row in steps:
        assert row["loss"] < math.log(320) + 1.0
        assert row["in_context/level0"] > 0  # wrote at token 32
        assert row["in_context/level1"] == 0  # is due at token 64, which is not in the row
    assert all(math.isfinite(row["validation_bpb"]) for row in records(summary.folder, "eval"))
