import json
import random
from pathlib import Path

import pytest
import torch

from nested_lm.config.data import DataConfig
from nested_lm.config.model import ModelConfig
from nested_lm.data.pipeline import build
from nested_lm.data.shards import TokenDataset
from nested_lm.nn.model import LanguageModel
from nested_lm_lab.evaluation.schema import CheckpointMark, ResultFile, RunIdentity
from nested_lm_lab.tasks.schema import SamplingMetrics, TextSample


@pytest.fixture
def make_result():
    """Build a small result file; identity fields can be overridden."""

    def make(*, task_version="1", settings=None, metrics=None, **identity):
        fields = {
            "run_id": "r1",
            "name": "hope-demo",
            "arm": "self_modifying+cms",
            "config_hash": "c" * 16,
            "data_hash": "d" * 16,
            "tokenizer_hash": "t" * 16,
            "commit": "abc",
            "seed": 0,
            "parameters": 1000,
            "tokens": 4096,
            "step": 4,
            "context_length": 256,
        } | identity
        metrics = metrics or SamplingMetrics(
            kind="sampling",
            samples=(TextSample(prompt="We", text=" the people — ünd", tokens=3, ended=True, seed=0),),
            tokens_per_s=12.5,
        )
        return ResultFile(
            schema_version=1,
            task=metrics.kind,
            task_version=task_version,
            identity=RunIdentity(**fields),
            settings=settings or {"max_new_tokens": 3},
            checkpoint=CheckpointMark(name="step-00000004", digest="0" * 32),
            device="cpu",
            metrics=metrics,
            created="2026-01-02T03:04:05+00:00",
            wall_seconds=0.25,
        )

    return make


WORDS = ["the", "union", "of", "states", "shall", "keep", "its", "army", "and", "navy", "in", "peace"]


def write_documents(path: Path, *, count: int = 60) -> None:
    """Dated documents of very different lengths, from 1800 to 1899."""
    rng = random.Random(7)
    with path.open("w") as file:
        for index in range(count):
            words = rng.choices(WORDS, k=rng.choice([3, 8, 20, 60, 150]))
            year = 1800 + index * 100 // count
            text = " ".join(words) + f" {index}."
            file.write(json.dumps({"text": text, "date": f"{year}-12-01"}) + "\n")


@pytest.fixture(scope="session")
def data_config(tmp_path_factory) -> DataConfig:
    """Configuration of a small data set that has been built."""
    root = tmp_path_factory.mktemp("data")
    write_documents(root / "documents.jsonl")
    config = DataConfig(
        name="tiny",
        output_dir=str(root / "built"),
        source={"kind": "folder", "path": str(root / "documents.jsonl"), "date_field": "date"},
        tokenizer={"kind": "byte_bpe", "vocab_size": 300},
        split={"train": 0.6, "validation": 0.2, "test": 0.2},
    )
    build(config, report=lambda line: None)
    return config


@pytest.fixture(scope="session")
def held_out(data_config) -> TokenDataset:
    return TokenDataset.open(Path(data_config.output_dir), "test")


def model_config(kind: str) -> ModelConfig:
    """One small layer, of Hope or of a Transformer."""
    mixers = {
        "attention": {"kind": "attention", "num_heads": 2},
        "self_modifying": {"kind": "self_modifying", "num_heads": 2, "head_width": 8, "chunk": 4},
    }
    channels = {
        "attention": {"kind": "swiglu", "expansion": 2.0},
        "self_modifying": {"kind": "cms", "levels": [{"period_tokens": 64, "expansion": 1.0}]},
    }
    return ModelConfig(vocab_size=300, width=16, num_layers=1, mixer=mixers[kind], channel=channels[kind])


@pytest.fixture(scope="session")
def make_model():
    """Build a small model whose predictions depend strongly on what it has read."""

    def make(kind: str) -> LanguageModel:
        model = LanguageModel(model_config(kind)).eval()
        model.initialise(3)
        with torch.no_grad():
            model.embedding.weight.mul_(20.0)
        return model

    return make
