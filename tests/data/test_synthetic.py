import numpy as np
import pytest

from nested_lm.data.synthetic import passkey_document
from nested_lm.data.tokenizer import TextTokenizer
from nested_lm.errors import DataError


@pytest.fixture(scope="module")
def tokenizer(tiny_data) -> TextTokenizer:
    return TextTokenizer.load(tiny_data.folder / "tokenizer.json")


def places(prompt, answer) -> list[int]:
    windows = np.lib.stride_tricks.sliding_window_view(prompt, len(answer))
    return np.flatnonzero((windows == answer).all(axis=1)).tolist()


@pytest.mark.parametrize("length", [128, 129, 131, 500, 2048, 8191])
@pytest.mark.parametrize("depth", [0.0, 0.31, 0.5, 1.0])
def test_exact_length_and_the_key_once_at_its_depth(tokenizer, length, depth):
    document = passkey_document(tokenizer, length=length, depth=depth, seed=length)
    assert len(document.prompt) == length
    assert document.prompt[0] == tokenizer.end_of_text
    found = places(document.prompt, document.answer)
    assert len(found) == 1
    text = tokenizer.decode(document.prompt[1:])
    assert text.count(document.key) == 1
    assert text.endswith("What is the pass key? The pass key is")
    assert f" The pass key is {document.key}. Remember it." in text
    assert tokenizer.decode(document.answer) == f" {document.key}"
    noise = length - 1 - 100  # the sentences of key and question take about 100 tokens here
    if noise > 400:
        assert abs((found[0] - 20) / noise - depth) < 40 / noise + 0.05


def test_depth_moves_the_key_monotonically(tokenizer):
    documents = [passkey_document(tokenizer, length=1000, depth=d / 10, seed=1) for d in range(11)]
    assert len({document.key for document in documents}) == 1
    found = [places(document.prompt, document.answer)[0] for document in documents]
    assert found == sorted(found)
    assert len(set(found)) == 11


def test_control_differs_in_the_key_only(tokenizer):
    document = passkey_document(tokenizer, length=600, depth=0.4, seed=3)
    control = passkey_document(tokenizer, length=600, depth=0.4, seed=3, with_key=False)
    assert len(control.prompt) == 600
    assert np.array_equal(control.answer, document.answer)
    assert not any(digit in tokenizer.decode(control.prompt) for digit in "0123456789")
    assert places(control.prompt, control.answer) == []


def test_seeds_give_other_keys(tokenizer):
    keys = {passkey_document(tokenizer, length=300, depth=0.5, seed=seed).key for seed in range(50)}
    assert len(keys) >= 49
    assert all(len(key) == 5 for key in keys)


def test_too_short(tokenizer):
    with pytest.raises(DataError, match="Use lengths of") as caught:
        passkey_document(tokenizer, length=20, depth=0.5, seed=0)
    shortest = int(str(caught.value).split("Use lengths of ")[1].split()[0])
    assert len(passkey_document(tokenizer, length=shortest, depth=0.5, seed=0).prompt) == shortest
    with pytest.raises(DataError):
        passkey_document(tokenizer, length=shortest - 1, depth=0.5, seed=0)
