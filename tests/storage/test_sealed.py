import json
import random

import pytest

from nested_lm.storage.sealed import seal, unseal

DOCUMENT = {"event": "step", "step": 3, "loss": 1.5e-7, "name": "ä", "nested": {"a": [1, None, True]}}


@pytest.mark.parametrize("indent", [None, 2])
def test_every_bit_flip_is_found(indent):
    whole = seal(DOCUMENT, indent=indent)
    assert unseal(whole) == (DOCUMENT, True)
    assert json.loads(whole).items() >= DOCUMENT.items()
    for position in range(8 * (len(whole) - 1)):  # the newline stands for nothing
        changed = bytearray(whole)
        changed[position // 8] ^= 1 << position % 8
        with pytest.raises(ValueError, match=r"."):
            unseal(bytes(changed))


def test_what_an_earlier_version_wrote_is_read_and_not_called_sealed():
    assert unseal(json.dumps(DOCUMENT).encode()) == (DOCUMENT, False)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"3", b"\xff", b"[" * 100_000, b'{"a": NaN, "seal": "0123456789abcdef"}']
)
def test_what_is_no_document_is_a_value_error(content):
    with pytest.raises(ValueError, match=r"."):
        unseal(content)


def test_random_documents_come_back():
    rng = random.Random(0)
    for _ in range(100):
        document = {f"k{rng.random()}": rng.choice([rng.random(), rng.randrange(10**12), "x\n", None, {}, []])}
        assert unseal(seal(document)) == (document, True)
