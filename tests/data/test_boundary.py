"""Documents between two special tokens of a tokenizer that was made elsewhere."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from nested_lm.data.loader import evaluation_batches
from nested_lm.data.pipeline import build
from nested_lm.data.shards import TokenDataset
from nested_lm.data.synthetic import passkey_document
from nested_lm.data.token_bytes import bytes_per_token
from nested_lm.data.tokenizer import TextTokenizer, train_tokenizer
from nested_lm.errors import DataError


def foreign(path, *around):
    """A tokenizer whose token 0 is a letter, and that puts these special tokens around a text: before, behind."""
    train_tokenizer(["some text for a few merges " * 3], 270, path)
    content = json.loads(path.read_text())
    names = {token: index for index, token in enumerate(content["model"]["vocab"]) if token != "<|endoftext|>"}
    content["model"]["vocab"] = {token: index - 1 for token, index in names.items()}
    content["added_tokens"] = []
    path.write_text(json.dumps(content))
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if around:
        single = " ".join([around[0], "$A", *around[1:]])
        ids = [(name, tokenizer.token_to_id(name)) for name in dict.fromkeys(around)]
        tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=ids)
    path.write_text(tokenizer.to_str())
    return path


def test_the_post_processor_names_the_tokens_around_a_document(tmp_path):
    both = TextTokenizer.load(foreign(tmp_path / "both.json", "<s>", "</s>"))
    assert (both.start_of_text, both.end_of_text) == (269, 270)
    assert both.encode("a<s>b") == both.encode("a") + both.encode("<s>") + both.encode("b")
    assert not {269, 270} & set(both.encode("a<s>b</s>"))
    one = TextTokenizer.load(foreign(tmp_path / "one.json", "<s>"))
    assert (one.start_of_text, one.end_of_text) == (269, 269)


def test_our_own_tokenizers_keep_token_0_at_both_ends(tmp_path):
    own = train_tokenizer(["some text " * 3], 260, tmp_path / "own.json")
    assert (own.start_of_text, own.end_of_text) == (0, 0)


def test_a_tokenizer_without_tokens_around_a_document_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"token 0 is '!', expected '<\|endoftext\|>'"):
        TextTokenizer.load(foreign(tmp_path / "none.json"))


def test_more_than_two_tokens_around_a_document_are_refused(tmp_path):
    with pytest.raises(DataError, match="puts 3 tokens around a text: '<s>', '</s>', '</s>'"):
        TextTokenizer.load(foreign(tmp_path / "three.json", "<s>", "</s>", "</s>"))


def test_batches_begin_and_end_documents_with_them(tmp_path, make_config):
    path = foreign(tmp_path / "foreign.json", "<s>", "</s>")
    folder = build(make_config(tokenizer={"kind": "file", "path": str(path)}), report=lambda line: None)
    dataset = TokenDataset.open(folder, "train")
    assert dataset.boundary == (269, 270)
    found = set()
    for batch in evaluation_batches(dataset, context_length=16, batch_size=4, align=1):
        for row in range(len(batch.inputs)):
            for document in np.unique(batch.documents[row][batch.documents[row] >= 0]):
                mine = (batch.documents[row] == document).numpy()
                inputs, targets = batch.inputs[row][mine].numpy(), batch.targets[row][mine].numpy()
                starts, ends = np.flatnonzero(inputs == 269), np.flatnonzero(targets == 270)
                assert list(starts) in ([], [0])
                assert list(ends) in ([], [len(targets) - 1])
                assert not (inputs == 270).any()
                assert not (targets == 269).any()
                found |= {(document, "start")} if len(starts) else set()
                found |= {(document, "end")} if len(ends) else set()
    assert found == {(index, side) for index in range(len(dataset.documents)) for side in ("start", "end")}


def test_special_tokens_have_no_bytes_and_token_0_has_one(tmp_path, make_config):
    path = foreign(tmp_path / "foreign.json", "<s>", "</s>")
    folder = build(make_config(tokenizer={"kind": "file", "path": str(path)}), report=lambda line: None)
    lengths = bytes_per_token(TokenDataset.open(folder, "train"))
    assert lengths[[0, 269, 270]].tolist() == [1, 0, 0]


def test_a_synthetic_document_begins_with_the_start_token(tmp_path):
    tokenizer = TextTokenizer.load(foreign(tmp_path / "foreign.json", "<s>", "</s>"))
    assert passkey_document(tokenizer, length=200, depth=0.5, seed=0).prompt[0] == 269
