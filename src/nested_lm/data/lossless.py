"""Whether texts come back from their tokens: probes for a new tokenizer, and what is said of a text that is lost."""

from collections.abc import Iterator
from itertools import takewhile
from typing import Any

from tokenizers import Tokenizer, decoders

# All bytes that UTF-8 uses: those of U+0000 to U+07FF, then each first byte of three and of four.
PROBE = (
    "A\u00e9\u6f22\U0001f642  \r\n\t\x00 1234'll <|endoftext|>_\ufb01\u00a0e\u0301 ."
    + "".join(map(chr, range(0x800)))
    + "".join(chr(first << 12) for first in range(1, 16))
    + "".join(chr(first << 18) for first in range(1, 5))
    + "\u0800\U00010000"
)
_SHOWN_CHARACTERS = 20  # of a text that does not come back, on either side of the first difference


class LostTextError(Exception):  # the tokenizer makes a DataError of it that names the text
    """A text that does not come back from its tokens. index: its place among those that were given."""

    def __init__(self, index: int, message: str) -> None:
        super().__init__(message)
        self.index = index


def utf8_of(text: str, index: int) -> bytes:
    """Bytes of a text. Raises LostTextError for half a surrogate pair, which has none."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        byte = f", byte {code - 0xDC00:#04x} of what is not UTF-8" if 0xDC80 <= code <= 0xDCFF else ""
        raise LostTextError(
            index, f"is given text that is not Unicode: character {error.start} is a lone surrogate{byte}"
        ) from None


def lost(text: str, found: str | bytes, index: int) -> LostTextError:
    """What to say of a text that comes back as something else."""
    back = found if isinstance(found, str) else found.decode(errors="replace")
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, back, strict=False)))
    shown = slice(max(0, same - _SHOWN_CHARACTERS), same + _SHOWN_CHARACTERS)
    return LostTextError(
        index,
        f"changes texts: {text[shown]!a} comes back as {back[shown]!a}\n"
        "  Scores need a lossless tokenizer: a token for every byte, no normaliser that replaces, and added tokens "
        "that take in no space around them. Use another one, such as tokenizer.kind=byte_bpe trains.",
    )


def suspects(content: dict[str, Any]) -> Iterator[str]:
    """Texts that a tokenizer.json may lose though it keeps others: its added tokens, what its normaliser replaces."""
    words = [token["content"] for token in content.get("added_tokens") or [] if not token["special"]]
    words += _replaced(content.get("normalizer"))
    for word in words:
        yield f"a {word} b{word}c \n{word}\n"


def _replaced(normaliser: Any) -> Iterator[str]:
    """Strings that a normaliser, or one of a sequence, looks for."""
    if isinstance(normaliser, dict):
        if isinstance(found := normaliser.get("pattern"), dict) and "String" in found:
            yield found["String"]
        for child in normaliser.get("normalizers") or []:
            yield from _replaced(child)


def token_spellings(tokenizer: Tokenizer) -> list[bytes] | None:
    """Bytes that a byte-level decoder makes of each token id; None for any other decoder.

    Bytes of a text are the bytes of its tokens, one after another. A token with a character outside the alphabet of
    byte-level BPE, as added tokens may have, stands for its own UTF-8.
    """
    if not isinstance(tokenizer.decoder, decoders.ByteLevel):
        return None
    alphabet = _alphabet()
    letters = str.maketrans(alphabet)
    known = set(alphabet)
    texts = [tokenizer.id_to_token(index) or "" for index in range(tokenizer.get_vocab_size(with_added_tokens=True))]
    return [text.translate(letters).encode("latin-1") if known.issuperset(text) else text.encode() for text in texts]


def _alphabet() -> dict[str, str]:
    """The character of byte-level BPE for each byte (GPT-2): itself where it prints, else one from U+0100 on."""
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printing]
    return {chr(byte): chr(byte) for byte in printing} | {
        chr(0x100 + index): chr(byte) for index, byte in enumerate(others)
    }
