import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nested_lm.data.tokenizer import TextTokenizer, cut, train_tokenizer
from nested_lm.errors import DataError

TEXTS = ["The quick brown fox's den, isn't it?\n\n  Twelve  words\tand 1234 more.\r\n"] * 3 + [
    "ros\u00e9 \u6f22\u5b57 \u00e9tat"
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> TextTokenizer:
    return train_tokenizer(TEXTS, 300, tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_every_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 < token < tokenizer.vocab_size for token in ids)


def test_end_of_text_in_a_text_is_text(tokenizer):
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.end_of_text == 0
    assert 0 not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"
    assert tokenizer.decode([0, *tokenizer.encode("x")]) == "<|endoftext|>x"


@given(
    text=st.text(st.sampled_from("ab1'.!\u00e9\u6f22 \n\t\r\u00a0\u2003\x1c\x85_"), max_size=60),
    characters=st.integers(1, 12),
)
@settings(max_examples=400)
def test_cutting_changes_no_token(tokenizer, text, characters):
    pieces = list(cut(text, characters))
    assert "".join(pieces) == text
    assert [token for piece in pieces for token in tokenizer.encode(piece)] == tokenizer.encode(text)


def test_long_texts_are_encoded_in_pieces(tokenizer):
    text = "The quick brown fox\n\nand so on " * 20_000
    assert len(list(cut(text, 1 << 16))) > 5
    assert tokenizer.encode(text) == tokenizer._tokenizer.encode(text).ids


def test_encode_many_is_encode(tokenizer):
    found = [ids.tolist() for ids in tokenizer.encode_many([*TEXTS, "", "x"])]
    assert found == [tokenizer.encode(text) for text in [*TEXTS, "", "x"]]


def test_training_is_deterministic_across_processes(tokenizer, tmp_path):
    code = (
        "import sys, pathlib; from nested_lm.data.tokenizer import train_tokenizer;"
        f"print(train_tokenizer({TEXTS!r}, 300, pathlib.Path(sys.argv[1])).hash)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "t.json")], check=True, capture_output=True, text=True
    )
    assert found.stdout.strip() == tokenizer.hash


def test_too_little_text(tmp_path):
    with pytest.raises(DataError, match=r"vocabulary of \d+ tokens, tokenizer.vocab_size is 400"):
        train_tokenizer(["abc"], 400, tmp_path / "t.json")
    assert not (tmp_path / "t.json").exists()


class TestLoad:
    def edited(self, tokenizer, tmp_path, **changes):
        path = tmp_path / "tokenizer.json"
        content = json.loads(tokenizer._tokenizer.to_str()) | changes
        path.write_text(json.dumps(content))
        return path

    def test_missing(self, tmp_path):
        with pytest.raises(DataError, match="cannot be read"):
            TextTokenizer.load(tmp_path / "nothing.json")

    def test_cut_short(self, tokenizer, tmp_path):
        path = tmp_path / "tokenizer.json"
        path.write_text(tokenizer._tokenizer.to_str()[:500])
        with pytest.raises(DataError, match=r"is not a Hugging Face tokenizer\.json"):
            TextTokenizer.load(path)

    def test_another_first_token(self, tokenizer, tmp_path):
        model = json.loads(tokenizer._tokenizer.to_str())["model"]
        model["vocab"] = {k.replace("<|endoftext|>", "<s>"): v for k, v in model["vocab"].items()}
        path = self.edited(tokenizer, tmp_path, model=model, added_tokens=[])
        with pytest.raises(DataError, match="token 0 is '<s>', expected"):
            TextTokenizer.load(path)

    def test_a_normaliser_that_changes_texts(self, tokenizer, tmp_path):
        path = self.edited(tokenizer, tmp_path, normalizer={"type": "Lowercase"})
        with pytest.raises(DataError, match="changes texts"):
            TextTokenizer.load(path)
