"""A hub source on local Parquet files: what is asked of the hub, what is read, and what is refused."""

import pytest
from pydantic import ValidationError

from nested_lm.config.data import DataConfig
from nested_lm.data.pipeline import build
from nested_lm.data.shards import TokenDataset
from nested_lm.errors import DataError

huggingface_hub = pytest.importorskip("huggingface_hub")
parquet = pytest.importorskip("pyarrow.parquet")

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def config(tmp_path):
    def make(**source) -> DataConfig:
        return DataConfig.model_validate(
            {
                "name": "hub",
                "output_dir": str(tmp_path / "built"),
                "source": {
                    "kind": "hub",
                    "path": str(tmp_path / "fetched"),
                    "repository": "owner/texts",
                    "revision": REVISION,
                    "files": ["sample/*.parquet"],
                    "licence": "CC0-1.0",
                    **source,
                },
                "tokenizer": {"kind": "byte_bpe", "vocab_size": 280, "max_bytes": 500},
            }
        )

    return make


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Stand in for the hub: notes the request and puts two Parquet files and a file of another kind into the folder."""
    import pyarrow

    requests = []

    def snapshot_download(repository, **request):
        requests.append((repository, request))
        folder = tmp_path / "fetched" / "sample"
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(2):
            texts = [f"Document {index} of file {number}, with some words." for index in range(40)]
            parquet.write_table(pyarrow.table({"text": texts}), folder / f"{number}.parquet")
        (tmp_path / "fetched" / "other.jsonl").write_text('{"text": "left from another preset"}\n')

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return requests


def test_documents_come_from_the_named_files_at_the_revision(config, asked, tmp_path):
    folder = build(config(), report=lambda line: None)
    (repository, request) = asked[0]
    assert repository == "owner/texts"
    assert request == {
        "repo_type": "dataset",
        "revision": REVISION,
        "allow_patterns": ["sample/*.parquet"],
        "local_dir": str(tmp_path / "fetched"),
    }
    splits = [TokenDataset.open(folder, split) for split in ("train", "validation", "test")]
    ids = [row.id for dataset in splits for row in dataset.documents]
    assert len(ids) == 80
    assert all(name.startswith(("sample/0.parquet:", "sample/1.parquet:")) for name in ids)
    assert "owner/texts at 0123456789abcdef" in (folder / "manifest.json").read_text()


def test_a_pattern_without_a_file_is_refused(config, asked):
    with pytest.raises(DataError, match=r"has no file 'sampel/\*' that can be read"):
        build(config(files=["sample/*", "sampel/*"]), report=lambda line: None)


def test_a_hub_that_cannot_be_reached_is_a_data_error(config, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no route to host\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(DataError, match=r"owner/texts at 0123456789ab cannot be fetched: no route to host\n"):
        build(config(), report=lambda line: None)


@pytest.mark.parametrize("change", [{"revision": "main"}, {"repository": "texts"}, {"files": []}])
def test_what_does_not_fix_the_bytes_is_refused(config, change):
    with pytest.raises(ValidationError):
        config(**change)


def test_the_tokenizer_may_be_trained_on_a_sample(config, asked, monkeypatch, tmp_path):
    seen = []
    original = __import__("nested_lm.data.pipeline", fromlist=["train_tokenizer"]).train_tokenizer

    def train_tokenizer(texts, vocab_size, path):
        seen.extend(texts)
        return original(iter(seen), vocab_size, path)

    monkeypatch.setattr("nested_lm.data.pipeline.train_tokenizer", train_tokenizer)
    folder = build(config(), report=lambda line: None)
    everything = [row.bytes for row in TokenDataset.open(folder, "train").documents]
    size = sum(len(text.encode()) for text in seen)
    assert 250 < size <= 500 + max(everything)
    assert sum(everything) > 2000
    assert len({text.split("file ")[1][0] for text in seen}) == 2  # from both files
