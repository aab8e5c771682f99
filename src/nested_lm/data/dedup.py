"""Exact duplicates: two documents are one when their normalised texts are equal."""

import hashlib
import unicodedata


def content_hash(text: str) -> str:
    """sha256 of the text in NFC with every run of white space as one space and none at the ends.

    Copies that differ in line breaks, indentation or Unicode composition get the same hash.
    """
    return hashlib.sha256(" ".join(unicodedata.normalize("NFC", text).split()).encode()).hexdigest()


class ExactDuplicates:
    """Remembers contents seen so far: 32 bytes a document."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()
        self.removed = 0

    def is_new(self, content: str) -> bool:
        """Whether this `content_hash` comes for the first time; counts it as removed otherwise."""
        key = bytes.fromhex(content)
        if key in self._seen:
            self.removed += 1
            return False
        self._seen.add(key)
        return True
