"""Haystacks: sentences, tokenised one by one, that a prompt is filled up with.

noise: RULER's five sentences in turn. needle: needles with other keys. books: running text, no sentence twice.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np

from nested_lm.config.data import FolderSource
from nested_lm.data.corpora import CORPORA, read_documents
from nested_lm.data.document import Document
from nested_lm.data.readers import SUFFIXES, read_file
from nested_lm.data.tokenizer import TextTokenizer
from nested_lm.errors import DataError
from nested_lm_lab.tasks.needles.words import draw_numbers, draw_uuids, draw_words

NOISE = ("\nThe grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.",)
"""RULER's noise: one line, again and again. It holds no digit and no key."""

NEEDLE = "One of the special magic {kind} for {key} is: {value}."

SHIPPED = "sotu"
"""Corpus in the package that `books` reads when the user names no file."""

_SENTENCE = re.compile(
    r".+?(?:[.!?\u2026\u0589\u061f\u06d4\u0964\u0965\u104b\u1362\u17d4\u203d]+[\"'\u201d\u2019\u00bb)\]]*(?=\s|$)"
    r"|[\u3002\uff01\uff1f\uff61\uff0e]+[\u300d\u300f\u201d\u2019\uff09]*|$)",
    re.DOTALL,
)
"""A sentence with its mark and closing quotes. Latin, Greek, Cyrillic, Armenian, Arabic, Urdu, Indic, Burmese, Ethiopic
and Khmer marks need white space or the end after them; Chinese and Japanese ones do not."""

_LONGEST, _PIECE = 1000, 240
"""Characters of the longest sentence, and of the pieces that a longer one is cut into: text without marks."""

_READ_AHEAD = 64  # sentences tokenised at once
_MAX_DOCUMENT_BYTES = 1 << 28


class Unit(NamedTuple):
    """Tokens that stand together. whole: must not be cut."""

    tokens: np.ndarray
    whole: bool = False


class Haystack(Protocol):
    """Where the text around needles comes from. identity: what a result file says about it. joint: what stands before
    a needle in such text, as RULER joins it.
    """

    identity: str
    joint: str

    def units(self, rng: np.random.Generator, used_keys: Sequence[str]) -> Iterator[Unit]:
        """Units in the order of a sample's text, from a place that `rng` chooses.

        used_keys: keys of the sample, which must not occur.

        Raises:
            DataError: from the iterator, when there is no more text.
        """
        ...


@dataclass(frozen=True)
class Noise:
    """One line of five sentences, again and again."""

    tokenizer: TextTokenizer
    identity: str = "noise"
    joint: str = "\n"

    def units(self, rng: np.random.Generator, used_keys: Sequence[str]) -> Iterator[Unit]:  # noqa: ARG002
        """Without an end."""
        (line,) = self.tokenizer.encode_many(NOISE)
        while True:
            yield Unit(line)


@dataclass(frozen=True)
class Needles:
    """Needles of the same kind with keys and values of their own, which are never cut."""

    tokenizer: TextTokenizer
    keys: Literal["words", "uuids"]
    values: Literal["numbers", "uuids"]
    identity: str = "needle"
    joint: str = "\n"

    def units(self, rng: np.random.Generator, used_keys: Sequence[str]) -> Iterator[Unit]:
        """As many as there are keys."""
        taken = set(used_keys)
        while True:
            count = max(_READ_AHEAD, len(taken))
            try:
                # One draw without replacement of all keys so far and as many again keeps them different.
                keys = draw_uuids(rng, count) if self.keys == "uuids" else draw_words(rng, count)
            except ValueError as error:
                raise DataError(
                    f"the needle haystack is too short: {error}. Use shorter lengths, or task mk3 with UUIDs"
                ) from error
            fresh = [key for key in keys if key not in taken]
            taken.update(fresh)
            values = draw_uuids(rng, len(fresh)) if self.values == "uuids" else draw_numbers(rng, len(fresh))
            texts = [
                self.joint + NEEDLE.format(kind=self.values, key=k, value=v) for k, v in zip(fresh, values, strict=True)
            ]
            yield from (Unit(tokens, whole=True) for tokens in self.tokenizer.encode_many(texts))


class Books:
    """Sentences of running text in their order, from a random one, round the end of the last book, none of them twice.

    Source: in the place of RULER's essays, whose copies repeat themselves beyond about 150,000 tokens.
    """

    joint = " "

    def __init__(self, tokenizer: TextTokenizer, documents: Sequence[Document], *, origin: str) -> None:
        self.tokenizer = tokenizer
        self.origin = origin
        self.sentences = list(chain.from_iterable(split_sentences(document.text) for document in documents))
        if not self.sentences:
            raise DataError(f"the haystack has no text: {origin}")
        digest = hashlib.sha256("\n".join(self.sentences).encode()).hexdigest()
        self.identity = f"books {origin}, {len(self.sentences)} sentences, sha256 {digest[:16]}"

    @classmethod
    def open(cls, tokenizer: TextTokenizer, files: Sequence[Path]) -> "Books":
        """Read text files, or the corpus in the package when there are none.

        Raises:
            DataError: a file that cannot be read.
        """
        if not files:
            return cls(tokenizer, list(read_documents(CORPORA[SHIPPED])), origin=SHIPPED)
        return cls(tokenizer, read_texts(files), origin=", ".join(path.name for path in files))

    def units(self, rng: np.random.Generator, used_keys: Sequence[str]) -> Iterator[Unit]:
        """Until every sentence was given once, those left out that hold a key."""
        count = len(self.sentences)
        begin = int(rng.integers(count))
        order = [*range(begin, count), *range(begin)]
        keys = [key.lower() for key in used_keys]
        given = 0
        for at in range(0, count, _READ_AHEAD):
            chosen = [self.sentences[index] for index in order[at : at + _READ_AHEAD]]
            free = [text for text in chosen if not any(key in text.lower() for key in keys)]
            for tokens in self.tokenizer.encode_many(free):
                given += len(tokens)
                yield Unit(tokens)
        raise DataError(
            f"the haystack is too short: {self.origin} has {given:,} tokens with this tokenizer, and text is never "
            "repeated. Use shorter lengths, or name more text with --books"
        )


def read_texts(files: Sequence[Path]) -> list[Document]:
    """All documents of text files, of any kind the data readers know.

    Raises:
        DataError: a file that is missing or cannot be read.
    """
    documents = []
    for path in files:
        if not path.is_file() or not path.name.endswith(SUFFIXES):
            raise DataError(f"{path} is not a text file; name files that end in {', '.join(SUFFIXES)}")
        source = FolderSource(kind="folder", path=str(path), max_document_bytes=_MAX_DOCUMENT_BYTES)
        for item in read_file(path, path.name, source):
            if not isinstance(item, Document):
                reason = item.reason.replace("_", " ")
                raise DataError(f"{item.position} cannot be used as a text: {reason}: {item.detail}")
            documents.append(item)
    return documents


def split_sentences(text: str) -> list[str]:
    """Sentences of any language, which together are the text; white space becomes single spaces.

    A sentence begins with the space that stands before it. The first begins with one too.
    """
    joined = " ".join(text.split())
    found: list[str] = []
    for match in _SENTENCE.finditer(f" {joined}" if joined else ""):
        found += _pieces(match[0])
    return found


def _pieces(sentence: str) -> Iterator[str]:
    """A sentence, cut where it is too long: at a space, else between characters that stand by themselves."""
    while len(sentence) > _LONGEST:
        at = sentence.rfind(" ", 1, _PIECE)
        if at < 1:
            at = next((at for at in range(_PIECE, 1, -1) if _stands_alone(sentence[at])), _PIECE)
        yield sentence[:at]
        sentence = sentence[at:]
    yield sentence


def _stands_alone(character: str) -> bool:
    """Whether a character does not belong to the one before it, as accents and joiners do."""
    return unicodedata.category(character) not in ("Mn", "Mc", "Me", "Cf", "Sk")
