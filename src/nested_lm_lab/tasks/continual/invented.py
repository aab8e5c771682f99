"""Invented words: pronounceable, and in no language by intention."""

import random

_CONSONANTS = "bdfgklmnprstvz"
_VOWELS = "aeiou"


def make_words(count: int, rng: random.Random, *, taken: set[str]) -> list[str]:
    """Draw distinct words of two or three syllables, none of them in `taken`, which they are added to."""
    words = []
    while len(words) < count:
        syllables = rng.choice((2, 3))
        word = "".join(rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(syllables))
        if word not in taken:
            taken.add(word)
            words.append(word)
    return words
