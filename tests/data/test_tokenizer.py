import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nested_lm.data.pipeline import build
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
    text=st.text(st.sampled_from("ab1'.!,\u3002\u00b2\u0301\u00e9\u6f22 \n\t\r\u00a0\u2003\x1c\x85_"), max_size=60),
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


def test_a_word_without_end_is_cut(tokenizer):
    text = "ab" * 50
    assert [len(piece) for piece in cut(text, 8, longest=30)] == [30, 30, 30, 10]
    assert [len(piece) for piece in cut("ab " + text, 2, longest=200)] == [2, 101]
    assert tokenizer.decode(tokenizer.encode("x" * 600_000)) == "x" * 600_000


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
        with pytest.raises(DataError, match=r"changes texts: .A.* comes back as .a"):
            TextTokenizer.load(path)

    def test_a_normaliser_that_replaces(self, tokenizer, tmp_path):
        replace = {"type": "Replace", "pattern": {"String": "\u2019"}, "content": "'"}
        path = self.edited(tokenizer, tmp_path, normalizer={"type": "Sequence", "normalizers": [replace]})
        with pytest.raises(DataError, match=r"changes texts: .*2019.* comes back as"):
            TextTokenizer.load(path)

    def test_bytes_without_a_token(self, tokenizer, tmp_path):
        content = json.loads(tokenizer._tokenizer.to_str())
        letters = ["<none>" if token == "\u00d1" else token for token in content["model"]["vocab"]]  # no byte 0xd1
        content["model"]["vocab"] = {token: index for index, token in enumerate(letters)}
        path = self.edited(tokenizer, tmp_path, model=content["model"])
        with pytest.raises(DataError, match="changes texts"):
            TextTokenizer.load(path)

    @pytest.mark.parametrize(
        ("content", "strip"), [("<x>", {"lstrip": True}), ("<x>", {"rstrip": True}), ("<\u00e9>", {})]
    )
    def test_added_tokens_that_lose_text(self, tokenizer, tmp_path, content, strip):
        token = {"id": 300, "content": content, "special": False, "normalized": False, "single_word": False}
        added = json.loads(tokenizer._tokenizer.to_str())["added_tokens"]
        path = self.edited(
            tokenizer, tmp_path, added_tokens=[*added, token | {"lstrip": False, "rstrip": False} | strip]
        )
        with pytest.raises(DataError, match="changes texts"):
            TextTokenizer.load(path)

    def test_an_end_that_a_text_can_spell(self, tokenizer, tmp_path):
        added = json.loads(tokenizer._tokenizer.to_str())["added_tokens"]
        path = self.edited(tokenizer, tmp_path, added_tokens=[added[0] | {"special": False}])
        with pytest.raises(DataError, match=r"a text that spells '<\|endoftext\|>' is encoded as token 0"):
            TextTokenizer.load(path)


class TestLostText:
    """What no probe finds is found in the text that is encoded."""

    @pytest.fixture
    def lossy(self, tokenizer, tmp_path) -> TextTokenizer:
        content = json.loads(tokenizer._tokenizer.to_str())
        content["normalizer"] = {"type": "Replace", "pattern": {"Regex": "quick"}, "content": "slow"}
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps(content))
        return TextTokenizer.load(path)

    def test_is_refused_by_name(self, lossy):
        assert lossy.encode("the brown fox")
        with pytest.raises(DataError, match="the tokenizer changes texts: 'the quick fox' comes back as"):
            lossy.encode("the quick fox")
        with pytest.raises(DataError, match="second changes texts"):
            lossy.encode_many(["x" * 10, "quick"], names=["first", "second"])

    def test_stops_a_build(self, lossy, make_config, source, tmp_path):
        (source / "17.txt").write_text("as quick as that")
        spec = {"kind": "file", "path": str(tmp_path / "tokenizer.json")}
        with pytest.raises(DataError, match=r"document '17.txt': the tokenizer changes texts: 'as quick as that'"):
            build(make_config(tokenizer=spec), report=lambda line: None)

    def test_what_is_not_unicode(self, tokenizer):
        with pytest.raises(DataError, match="character 3 is a lone surrogate, byte 0xe9 of what is not UTF-8"):
            tokenizer.encode("caf\udce9")
