"""Byte-level BPE: train, load, hash, encode. Every text comes back from its tokens, or is refused."""

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from nested_lm.data.lossless import PROBE, LostTextError, lost, suspects, token_spellings, utf8_of
from nested_lm.errors import DataError
from nested_lm.storage.atomic import write_atomically

END_OF_TEXT = "<|endoftext|>"

# A border of two pre-tokens whatever stands around it: before the line break that ends a run of white space,
# before a single space between two words, or between a letter or digit and a mark. Cutting there changes no token.
_BORDER = re.compile(r"\n(?=\S)|(?<=\S) (?=\S)|(?<=[^\W_])(?=[.,;:!?\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f])")
_PIECE_CHARACTERS = 1 << 16
_DECODED_BEFORE = 16  # tokens: more than one character has
# A run without any border is cut here all the same: the merges of one word of n bytes take about 250 n bytes of memory.
_WORD_CHARACTERS = 1 << 18
_GROUP_CHARACTERS = 1 << 22  # encoded at once


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
        self._can_cut = (
            byte_level
            and tokenizer.pre_tokenizer.use_regex
            and tokenizer.normalizer is None
            and all(token.special for token in tokenizer.get_added_tokens_decoder().values())
        )

    @classmethod
    def load(cls, path: Path) -> "TextTokenizer":
        """Read a `tokenizer.json`.

        The tokens that its post-processor puts around a text start and end every document: two tokens, or one that
        does both. Without any, token 0 must be `<|endoftext|>`.

        Raises: DataError when the file is missing or damaged, no token starts and ends documents, a text can spell
        that token, or a probe of all bytes, added tokens and replaced strings does not come back.
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
        _check(loaded, json.loads(content), path)
        return loaded

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without start or end token. Raises: as `encode_many`."""
        ids: list[int] = self.encode_many([text])[0].tolist()
        return ids

    def encode_many(self, texts: Sequence[str], *, names: Sequence[str] | None = None) -> list[np.ndarray]:
        """Token ids of several texts, int64, on all cores. Long texts are encoded piece by piece.

        names: what error messages call each text.

        Raises: DataError when a text does not come back from its tokens, or is not Unicode.
        """
        pieces: list[str] = []
        ends = []
        for text in texts:
            pieces.extend(cut(text, _PIECE_CHARACTERS) if self._can_cut else [text])
            ends.append(len(pieces))
        ids: list[np.ndarray] = []
        for group in _groups(pieces):
            try:
                ids += self._encode_group(group)
            except LostTextError as error:
                index = int(np.searchsorted(ends, len(ids) + error.index, side="right"))
                name = "the tokenizer" if names is None else names[index]
                raise DataError(f"{name} {error}") from None
        starts = [0, *ends[:-1]]
        return [np.concatenate(ids[start:end]) for start, end in zip(starts, ends, strict=True)]

    def _encode_group(self, pieces: list[str]) -> list[np.ndarray]:
        """Encode pieces and check that each comes back. Raises LostTextError for the first that does not."""
        texts: Sequence[str | bytes] = [utf8_of(piece, index) for index, piece in enumerate(pieces)]
        encoded = [piece.ids for piece in self._tokenizer.encode_batch_fast(pieces, add_special_tokens=False)]
        found: Sequence[str | bytes]
        if self.spellings is None:
            texts, found = pieces, self._tokenizer.decode_batch(encoded, skip_special_tokens=False)
        else:
            spell = self.spellings.__getitem__
            found = [b"".join(map(spell, ids)) for ids in encoded]
        if found != texts:
            index = next(index for index, text in enumerate(texts) if found[index] != text)
            raise lost(pieces[index], found[index], index)
        return [np.array(ids, dtype=np.int64) for ids in encoded]

    @functools.cached_property
    def spellings(self) -> list[bytes] | None:
        """UTF-8 bytes of each token id; None when the tokenizer is not byte-level, so that tokens have none."""
        return token_spellings(self._tokenizer)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids. Special tokens show by name; bytes that are no UTF-8 show as U+FFFD."""
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=False)

    def decode_after(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """Text that token ids add to the ones before them: a space or a part of a character may depend on those.

        before: without the start token. ids: from the first end token on they do not count.
        """
        new = [int(token) for token in ids]
        new = new[: new.index(self.end_of_text)] if self.end_of_text in new else new
        known = [int(token) for token in before[-_DECODED_BEFORE:]]
        text, whole = self.decode(known), self.decode([*known, *new])
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(text, whole, strict=False))
        return whole[sum(1 for _ in same) :]


def _check(loaded: TextTokenizer, content: dict[str, Any], path: Path) -> None:
    """Refuse a tokenizer that is known to lose or misread texts, before any is given to it."""
    if (last := max(loaded._tokenizer.get_vocab().values())) >= loaded.vocab_size:
        raise DataError(
            f"{path} has {loaded.vocab_size} tokens, the last of which is token {last}\n"
            "  Ids must have no gaps. Add tokens for those that are missing."
        )
    probes = [PROBE, *suspects(content)]
    loaded.encode_many(probes, names=[str(path)] * len(probes))
    for token in {loaded.start_of_text, loaded.end_of_text}:
        name = loaded.decode([token])
        if token in loaded.encode(name):
            raise DataError(
                f"{path}: a text that spells {name!r} is encoded as token {token}, which starts or ends a document\n"
                "  Mark it as a special token in added_tokens."
            )


def _groups(pieces: list[str]) -> Iterator[list[str]]:
    """Runs of pieces that are encoded at once."""
    group: list[str] = []
    characters = 0
    for piece in pieces:
        group.append(piece)
        characters += len(piece)
        if characters >= _GROUP_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


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


def cut(text: str, characters: int, *, longest: int = _WORD_CHARACTERS) -> Iterator[str]:
    """Pieces of about `characters` or a little more that byte-level BPE encodes as it encodes the whole.

    longest: a piece without a border is cut at this length, which may change the tokens next to the cut.
    """
    assert 1 <= characters <= longest, (characters, longest)
    start = 0
    while len(text) - start > characters:
        border = _BORDER.search(text, start + characters, start + longest)
        if border is None and len(text) - start <= longest:
            break
        end = start + longest if border is None else border.start()
        yield text[start:end]
        start = end
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
