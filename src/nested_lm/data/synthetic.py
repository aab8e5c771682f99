"""Synthetic documents that ask for something said earlier in them."""

from typing import NamedTuple

import numpy as np

from nested_lm.data.tokenizer import TextTokenizer
from nested_lm.errors import DataError

# The noise of RULER's pass-key task. No digits: the key stands nowhere but in its own sentence.
_NOISE = (
    " The grass is green.",
    " The sky is blue.",
    " The sun is yellow.",
    " Here we go.",
    " There and back again.",
)
_KEY_SENTENCE = " The pass key is {key}. Remember it."
_QUESTION = " What is the pass key? The pass key is"


class PasskeyDocument(NamedTuple):
    """prompt: int64 token ids, the start token first. answer: the ids that should follow. key: its digits."""

    prompt: np.ndarray
    answer: np.ndarray
    key: str


def passkey_document(
    tokenizer: TextTokenizer, *, length: int, depth: float, seed: int, with_key: bool = True
) -> PasskeyDocument:
    """A five-digit key in noise, then the question for it: exactly `length` tokens.

    Sentences are tokenised one by one and joined as ids, so lengths are exact; the last noise sentence is cut
    short where it must be. `depth` 0 puts the key before all noise, 1 after the last whole sentence; between,
    at the sentence border nearest that share of the noise. Key and noise depend on `seed` alone.

    Args:
        length: tokens of the prompt, its start token and the question included, the answer not.
        with_key: False puts noise in the place of the key's sentence: what the model knows without reading.

    Raises: DataError when `length` is too short for the key and the question.

    Source: RULER (arXiv 2404.06654), task niah_single_1, with a key of five digits.
    """
    assert 0.0 <= depth <= 1.0, depth
    rng = np.random.default_rng(seed)
    key = str(rng.integers(10_000, 100_000))
    first_sentence = int(rng.integers(len(_NOISE)))
    start = [tokenizer.start_of_text]
    needle = tokenizer.encode(_KEY_SENTENCE.format(key=key))
    question = tokenizer.encode(_QUESTION)
    room = length - len(start) - len(question) - len(needle)
    if room < 0:
        shortest = length - room
        raise DataError(
            f"a passkey document of {length} tokens has no room for the key and the question\n"
            f"  With this tokenizer they take {shortest} tokens. Use lengths of {shortest} or more."
        )
    if not with_key:
        room, needle = room + len(needle), []
    noise, borders = _noise(tokenizer, first_sentence, room)
    place = borders[np.abs(borders - depth * room).argmin()] if depth < 1.0 else borders[-1]
    prompt = np.concatenate([start, noise[:place], needle, noise[place:], question]).astype(np.int64)
    assert len(prompt) == length
    return PasskeyDocument(prompt, np.array(tokenizer.encode(f" {key}"), dtype=np.int64), key)


def _noise(tokenizer: TextTokenizer, first_sentence: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """`length` tokens of noise, and the places in it where a sentence begins or the last whole one ends."""
    sentences = tokenizer.encode_many(_NOISE)
    order = sentences[first_sentence:] + sentences[:first_sentence]
    rounds = length // sum(len(sentence) for sentence in order) + 1
    lengths = np.array([len(sentence) for sentence in order] * rounds)
    borders = np.concatenate([[0], np.cumsum(lengths)])
    return np.concatenate(order * rounds)[:length], borders[borders <= length]
