"""A trained model as one object: its scores, its memory, and text that goes on without losing a space."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import nested_lm as nl
from nested_lm.data.tokenizer import TextTokenizer
from nested_lm.errors import CheckpointError, ConfigError
from nested_lm.reading.trained import TrainedModel
from tests.reading.models import build

PIECES = ["<s>", "\u2581a", "\u2581b", "c", "<0xC3>", "<0xA9>"]


@pytest.fixture
def tokenizer():
    """As SentencePiece's: a space belongs to the word behind it, and that of the first word is not shown."""
    made = Tokenizer(models.BPE({piece: index for index, piece in enumerate(PIECES)}, [], byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return TextTokenizer(made, "h" * 64)


def test_new_text_is_decoded_behind_what_stands_before_it(tokenizer):
    assert tokenizer.decode([2]) == "b"
    assert tokenizer.decode_after([1], [2, 3]) == " bc"
    assert tokenizer.decode_after([], [2]) == "b"
    assert tokenizer.decode_after([1, 4], [5, 3]) == "\u00e9c"
    assert tokenizer.decode_after([1], [2, tokenizer.end_of_text, 3]) == " b"


class Letters:
    """A tokenizer of letters, for a model of 61 tokens."""

    start_of_text = end_of_text = 0
    hash = "t" * 64

    def encode_many(self, texts):
        return [np.array([1 + ord(letter) % 60 for letter in text], dtype=np.int64) for text in texts]

    def encode(self, text):
        return self.encode_many([text])[0].tolist()

    def decode_after(self, before, ids):
        return "".join(chr(64 + token) for token in ids)


def test_reading_changes_scores_until_it_is_forgotten(tmp_path):
    model = TrainedModel(build("hope"), Letters(), label="hope")
    fresh = model.score("abcdef")
    assert (fresh.tokens, fresh.bytes) == (7, 6)
    assert fresh.bits_per_byte == pytest.approx(fresh.nats.sum() / np.log(2) / 6)
    with pytest.raises(CheckpointError, match="nothing has been read"):
        model.save_memory(tmp_path / "m")
    read = model.read(["some text", "more"])
    assert (read.documents, read.tokens, read.bytes) == (2, 15, 13)
    assert "memory of 15 tokens" in repr(model)
    with_memory = model.score("abcdef")
    assert abs(with_memory.nats - fresh.nats).max() > 1e-3
    text = model.generate("a", max_new_tokens=4)
    np.testing.assert_array_equal(model.score("abcdef").nats, with_memory.nats)
    model.save_memory(tmp_path / "m")
    model.forget()
    np.testing.assert_array_equal(model.score("abcdef").nats, fresh.nats)
    model.load_memory(tmp_path / "m")
    np.testing.assert_array_equal(model.score("abcdef").nats, with_memory.nats)
    assert model.generate("a", max_new_tokens=4, remember=True) == text
    assert model.memory.position > 15


def test_what_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run folder"):
        nl.load(tmp_path)
    with pytest.raises(ConfigError, match="torch finds no CUDA device"):
        nl.load(tmp_path, device="cuda")
