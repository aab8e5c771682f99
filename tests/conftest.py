"""Fixtures of the whole suite: one thread, fixed seeds, NaN in uninitialised memory, a tiny data set."""

import json
import os
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import random

import numpy as np
import pytest
import torch
from hypothesis import settings

from nested_lm.config.data import DataConfig
from nested_lm.data.pipeline import build

torch.set_num_threads(1)

# A shared machine may be slow; hypothesis must not fail for that. Examples are the same in every run.
settings.register_profile("suite", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("suite")

VOCABULARY = """the union of these states shall keep its army and navy in peace while congress reads this
message on the revenue and the commerce of nations with which our citizens trade under treaties that honor
both"""


class TinyData(NamedTuple):
    """A built data set of 100 documents, 1800 to 1899, four periods, and its configuration."""

    folder: Path
    config: DataConfig


@pytest.fixture(autouse=True)
def _seeds():
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  for libraries that draw from the global generator
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan():
    """Fill what torch.empty and its kin return with NaN (integers: the largest value)."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


def write_tiny_documents(path: Path, *, count: int = 100) -> None:
    """Dated JSON lines of very different lengths."""
    rng = random.Random(10)
    with path.open("w", encoding="utf-8") as file:
        for index in range(count):
            words = rng.choices(VOCABULARY.split(), k=rng.choice([3, 10, 40, 120, 250]))
            row = {
                "text": " ".join(words).capitalize() + f", {index}.\n",
                "date": 1800 + index * 100 // count,
            }
            file.write(json.dumps(row) + "\n")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> TinyData:
    """Folder and configuration of a small data set, built once a session. Read only."""
    root = tmp_path_factory.mktemp("tiny")
    write_tiny_documents(root / "documents.jsonl")
    config = DataConfig(
        name="tiny",
        output_dir=str(root / "built"),
        source={"kind": "folder", "path": str(root / "documents.jsonl"), "date_field": "date"},
        tokenizer={"kind": "byte_bpe", "vocab_size": 320},
        split={"train": 0.6, "validation": 0.2, "test": 0.2},
    )
    return TinyData(build(config, report=lambda line: None), config)
