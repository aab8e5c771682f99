"""Byte-level BPE: train, load, hash, encode. Every text comes back from its tokens byte for byte."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from nested_lm.errors import DataError
from nested_lm.storage.atomic import write_atomically

END_OF_TEXT = "<|endoftext|>"

# A border of two pre-tokens whatever stands around it: before the line break that ends a run of white space,
# or before a single space between two words. Cutting there leaves every token as it was.
_BORDER = re.compile(r"\n(?=\S)|(?<=\S) (?=\S)")
_PIECE_CHARACTERS = 1 << 16

_PROBE = "Aé漢🙂  \r\n\t\x00 1234'll <|endoftext|>_ﬁ\u00a0e\u0301 ."


class TextTokenizer:
    """Text to token ids and back.

    start_of_text, end_of_text: tokens around every document, which no text encodes to. Token 0, `<|endoftext|>`, is
        both, unless the tokenizer's post-processor says otherwise (see `load`).
    hash: sha256 of tokenizer.json.
    """

    def __init__(self, tokenizer: Tokenizer, file_hash: str, *, start_of_text: int = 0, end_of_text: int = 0) -> None:
        self._tokenizer = tokenizer
        self.hash = file_hash
        self.start_of_text, self.end_of_text = start_of_text, end_of_text
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)
        byte_level = isinstance(tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel)
        self._can_cut = byte_level and tokenizer.pre_tokenizer.use_regex and tokenizer.normalizer is None

    @classmethod
    def load(cls, path: Path) -> "TextTokenizer":
        """Read a `tokenizer.json`.

        The tokens that its post-processor puts around a text start and end every document: two tokens, or one that
        does both. Without any, token 0 must be `<|endoftext|>`.

        Raises: DataError when the file is missing or damaged, no token starts and ends documents, or texts do not
        survive the round trip (a normaliser that changes them would falsify bits per byte).
        """
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"tokenizer {path} cannot be read: {error.strerror}") from error
        try:
            tokenizer = Tokenizer.from_buffer(content)
        except Exception as error:  # `tokenizers` raises bare Exception
            raise DataError(
                f"{path} is not a Hugging Face tokenizer.json: {error}\n"
                "  The file was changed or cut short. Build the data set again, or restore the file."
            ) from error
        tokenizer.encode_special_tokens = True  # "<|endoftext|>" inside a text is text
        tokenizer.no_truncation()
        tokenizer.no_padding()
        start, end = _boundary(tokenizer, path)
        loaded = cls(tokenizer, hashlib.sha256(content).hexdigest(), start_of_text=start, end_of_text=end)
        if (found := loaded.decode(loaded.encode(_PROBE))) != _PROBE:
            raise DataError(
                f"{path} changes texts: {_PROBE!r} comes back as {found!r}\n"
                "  Bits per byte need a lossless tokenizer: byte-level, without normaliser."
            )
        return loaded

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without start or end token."""
        ids: list[int] = self.encode_many([text])[0].tolist()
        return ids

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of several texts, int64, on all cores. Long texts are encoded piece by piece."""
        pieces: list[str] = []
        ends = []
        for text in texts:
            pieces.extend(cut(text, _PIECE_CHARACTERS) if self._can_cut else [text])
            ends.append(len(pieces))
        encoded = self._tokenizer.encode_batch_fast(pieces, add_special_tokens=False)
        ids = [np.array(piece.ids, dtype=np.int64) for piece in encoded]
        starts = [0, *ends[:-1]]
        return [np.concatenate(ids[start:end]) for start, end in zip(starts, ends, strict=True)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids. Special tokens show by name; bytes that are no UTF-8 show as U+FFFD."""
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=False)


def _boundary(tokenizer: Tokenizer, path: Path) -> tuple[int, int]:
    """Find the tokens that start and end a document.

    Raises: DataError when there are none, or more than two.
    """
    around: list[int] = tokenizer.encode("", add_special_tokens=True).ids
    if len(around) > 2:
        names = ", ".join(repr(tokenizer.id_to_token(token)) for token in around)
        raise DataError(
            f"{path} puts {len(around)} tokens around a text: {names}\n"
            "  Documents here have one token before them and one behind. Change its post_processor."
        )
    if around:
        return around[0], around[-1]
    if tokenizer.id_to_token(0) != END_OF_TEXT:
        raise DataError(
            f"{path}: token 0 is {tokenizer.id_to_token(0)!r}, expected {END_OF_TEXT!r}\n"
            "  Token 0 starts and ends every document, unless the post_processor of the file puts others around a "
            "text. Use a tokenizer with either, or let tokenizer.kind=byte_bpe train one."
        )
    return 0, 0


def cut(text: str, characters: int) -> Iterator[str]:
    """Pieces of about `characters` or a little more that byte-level BPE encodes as it encodes the whole."""
    assert characters >= 1, characters
    start = 0
    while len(text) - start > characters:
        border = _BORDER.search(text, start + characters)
        if border is None:
            break
        yield text[start : border.start()]
        start = border.start()
    yield text[start:]


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: Path) -> TextTokenizer:
    """Train a byte-level BPE of exactly `vocab_size` tokens and write it to `path`.

    Deterministic: the same texts give the same file. Reads the texts once, as a stream.

    Raises: DataError when the texts hold too few different words for the vocabulary.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    pieces = (piece for text in texts for piece in cut(text, _PIECE_CHARACTERS))
    tokenizer.train_from_iterator(pieces, trainer=trainer)
    found = tokenizer.get_vocab_size()
    if found != vocab_size:
        raise DataError(
            f"the training text gives a vocabulary of {found} tokens, tokenizer.vocab_size is {vocab_size}\n"
            f"  Set tokenizer.vocab_size={found} or less, or add text."
        )
    write_atomically(path, tokenizer.to_str().encode())
    return TextTokenizer.load(path)
