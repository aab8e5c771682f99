"""How many bytes of text each token stands for, so that a part of a document can be given in bits per byte."""

import numpy as np
from tokenizers import Tokenizer

from nested_lm.data.lossless import token_spellings
from nested_lm.data.shards import TokenDataset
from nested_lm.errors import DataError


def bytes_per_token(dataset: TokenDataset) -> np.ndarray:
    """UTF-8 bytes that each token id stands for; 0 for the start and the end of a document.

    Raises:
        DataError: the sums over the documents are not their sizes, so the tokenizer is not byte-level.
    """
    spellings = token_spellings(Tokenizer.from_file(str(dataset.folder / "tokenizer.json")))
    lengths = np.zeros(dataset.vocab_size, dtype=np.int64)
    if spellings is not None and len(spellings) == dataset.vocab_size:
        lengths[:] = [len(spelling) for spelling in spellings]
    lengths[list(dataset.boundary)] = 0
    for index, row in enumerate(dataset.documents):
        found = int(lengths[dataset.tokens(index)].sum())
        if found != row.bytes:
            raise DataError(
                f"{dataset.folder}: the tokens of document {row.id!r} stand for {found} bytes, its text has "
                f"{row.bytes}; bits per byte need a byte-level tokenizer such as tokenizer.kind=byte_bpe"
            )
    return lengths
