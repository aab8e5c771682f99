"""Long documents as several: so that a few books make splits that each hold some of them."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from nested_lm.data.document import Document
from nested_lm.data.readers import Item

_BORDERS = ("\n\n", "\n", " ")  # the best place first: between paragraphs, lines, words

_WANTED = 400
"""Documents that the advice aims at: 5 % of them are a validation split of about 20."""


def cut_long(items: Iterable[Item], characters: int) -> Iterator[Item]:
    """Cut documents into parts of at most so many characters, at the last border in the second half of each part.

    The parts of a document are its whole text, in order, named `ID#0`, `ID#1`, ...; parts of nothing but white space
    are left out.
    """
    for item in items:
        if not isinstance(item, Document) or len(item.text) <= characters:
            yield item
            continue
        parts = (part for part in _parts(item.text, characters) if part.strip())
        for number, part in enumerate(parts):
            yield replace(item, id=f"{item.id}#{number}", text=part)


def _parts(text: str, characters: int) -> Iterator[str]:
    start = 0
    while len(text) - start > characters:
        middle, last = start + characters // 2, start + characters
        found = ((text.rfind(border, middle, last), len(border)) for border in _BORDERS)
        end = next((at + length for at, length in found if at >= 0), last)
        yield text[start:end]
        start = end
    yield text[start:]


def advice(documents: int, size: int) -> str:
    """What to do about a split without documents. documents, size: of the data set, in number and in bytes."""
    cut = f"source.cut_characters={max(2000, size // _WANTED)}"
    return (
        f"The data set has {documents} documents: cut them, and build it in another folder with `nested-lm data PRESET "
        f"{cut} output_dir=FOLDER`, then `nested-lm train PRESET data.{cut} data.output_dir=FOLDER`. Or give the split "
        "a larger share."
    )
