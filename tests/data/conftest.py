import json
from collections.abc import Callable
from pathlib import Path

import pytest

from nested_lm.config.data import DataConfig

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]


@pytest.fixture
def source(tmp_path) -> Path:
    """Folder of 60 text files with different contents."""
    folder = tmp_path / "source"
    folder.mkdir()
    for index in range(60):
        text = " ".join(WORDS[(index * step) % 10] for step in range(1, 5 + 7 * (index % 9)))
        (folder / f"{index:02d}.txt").write_text(f"{text} {index}\n")
    return folder


@pytest.fixture
def make_config(tmp_path, source) -> Callable[..., DataConfig]:
    """A configuration of a build of `source` in `tmp_path / "built"`; keyword arguments replace parts."""

    def make(*, folder: dict | None = None, **fields) -> DataConfig:
        values = {
            "name": "test",
            "output_dir": str(tmp_path / "built"),
            "source": {"kind": "folder", "path": str(source)} | (folder or {}),
            "tokenizer": {"kind": "byte_bpe", "vocab_size": 280},
            "split": {"train": 0.5, "validation": 0.25, "test": 0.25},
        }
        return DataConfig(**(values | fields))

    return make


@pytest.fixture
def write_lines(tmp_path) -> Callable[..., Path]:
    """Write rows as JSON lines; a row of type bytes is written as it is."""

    def write(*rows: object, name: str = "rows.jsonl") -> Path:
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        path = tmp_path / name
        path.write_bytes(b"\n".join(lines) + b"\n")
        return path

    return write
