"""A few long documents can be cut, so that every split holds some; following the advice to the letter works."""

import random
import re

import pytest

from nested_lm.config.data import FolderSource
from nested_lm.config.load import load_data
from nested_lm.data.cut import cut_long
from nested_lm.data.document import BadDocument, Document
from nested_lm.data.loader import chosen_documents
from nested_lm.data.pipeline import build
from nested_lm.data.shards import TokenDataset
from nested_lm.errors import DataError

PRESET = """
name: novels
output_dir: whole
source: {kind: folder, path: novels, licence: own}
tokenizer: {kind: byte_bpe, vocab_size: 300}
"""


def cut(text, characters):
    return [part.text for part in cut_long([Document("d", text, None, "d.txt")], characters)]


def test_parts_are_the_whole_text_and_end_at_the_best_border():
    text = "one two.\n\nthree four\nfive six\n\nseven"
    parts = cut(text, 20)
    assert "".join(parts) == text
    assert parts[0] == "one two.\n\nthree four" or max(map(len, parts)) <= 20
    assert cut("aaaa bbbb cccc", 10) == ["aaaa bbbb ", "cccc"]
    assert cut("x" * 25, 10) == ["x" * 10, "x" * 10, "x" * 5]
    assert cut("short", 10) == ["short"]


def test_parts_have_names_of_their_own_and_what_is_bad_passes():
    bad = BadDocument("p", "empty", "the text is empty")
    parts = list(cut_long([Document("d", "word " * 100, "1790", "d.txt"), bad], 100))
    assert [part.id for part in parts[:-1]] == [f"d#{number}" for number in range(len(parts) - 1)]
    assert {part.date for part in parts[:-1]} == {"1790"}
    assert parts[-1] is bad


@pytest.mark.parametrize("seed", [0, 1])
def test_ten_novels_by_the_advice(tmp_path, monkeypatch, seed):
    monkeypatch.chdir(tmp_path)
    rng = random.Random(seed)
    (tmp_path / "novels").mkdir()
    for number in range(10):
        words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 8))) for _ in range(8000)]
        lines = [" ".join(words[at : at + 60]) for at in range(0, len(words), 60)]
        (tmp_path / f"novels/{number}.txt").write_text("\n\n".join(lines), encoding="utf-8")
    (tmp_path / "novels.yaml").write_text(PRESET, encoding="utf-8")
    said = []
    shares = "split={train: 0.95, validation: 0.05, test: 0.0}"
    with pytest.raises(DataError, match="none of the 10 documents") as refused:
        build(load_data("novels.yaml", ["split={train: 0.9999, validation: 0.0001, test: 0.0}"]), report=said.append)
    build(load_data("novels.yaml", ["split={train: 1.0, validation: 0.0, test: 0.0}"]), report=said.append)
    assert any("no validation documents. The data set has 10 documents" in line for line in said)
    with pytest.raises(DataError, match="the validation split has no documents") as missing:
        chosen_documents(TokenDataset.open(tmp_path / "whole", "validation"), periods=None, part=(0.0, 1.0), seed=1)
    options = {re.search(r"source\.cut_characters=\d+", str(error.value))[0] for error in (refused, missing)}
    assert len(options) == 1
    build(load_data("novels.yaml", [*options, shares, "output_dir=cut"]), report=said.append)
    sizes = {split: len(TokenDataset.open(tmp_path / "cut", split).documents) for split in ("train", "validation")}
    assert sizes["train"] > 5 * sizes["validation"] > 0


def test_what_is_not_cut_keeps_its_identity():
    source = FolderSource(kind="folder", path="texts")
    assert "cut_characters" not in source.model_dump(mode="json")
    assert source.model_copy(update={"cut_characters": 900}).model_dump()["cut_characters"] == 900
