import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from nested_lm.data.loader import evaluation_batches
from nested_lm.data.pipeline import build
from nested_lm.data.shards import TokenDataset
from nested_lm.data.tokenizer import TextTokenizer
from nested_lm.errors import DataError
from nested_lm.nn.model import LanguageModel, token_losses
from nested_lm.train.step import GradientComputer
from nested_lm.train.strategies.base import SingleDevice
from nested_lm.train.validation import Validator, bytes_per_token, open_validator

SINGLE = SingleDevice(torch.device("cpu"))


@pytest.fixture
def dataset(tiny_data):
    return TokenDataset.open(tiny_data.folder, "validation")


def test_bytes_per_token_are_those_of_the_text(dataset, tiny_data):
    lengths = bytes_per_token(dataset)
    tokenizer = TextTokenizer.load(tiny_data.folder / "tokenizer.json")
    for text in ("the army and navy", "é漢🙂", "<|endoftext|>"):
        assert lengths[tokenizer.encode(text)].sum() == len(text.encode())
    assert lengths[0] == 0
    assert lengths[1:257].tolist() == [1] * 256
    assert sum(row.bytes for row in dataset.documents) == sum(
        lengths[dataset.tokens(index)].sum() for index in range(len(dataset.documents))
    )


def test_a_tokenizer_whose_bytes_do_not_add_up_is_refused(dataset):
    dataset.documents[3] = dataclasses.replace(dataset.documents[3], bytes=dataset.documents[3].bytes + 1)
    with pytest.raises(DataError, match="bits per byte need a byte-level tokenizer"):
        bytes_per_token(dataset)


def test_loss_and_bits_per_byte_by_hand(make_config, dataset):
    config = make_config(evaluate_tokens=10**6)
    model = LanguageModel(config.model)
    model.initialise(0)
    computer = GradientComputer(model, dict(model.named_parameters()), SINGLE, precision="float32")
    model.train()
    found = open_validator(config).run(model, computer, SINGLE, is_stopped=lambda: False)
    assert model.training  # left as it was
    nats = tokens = 0
    with torch.no_grad():
        for batch in evaluation_batches(dataset, 16, 4, 1):
            nats += token_losses(model(batch.inputs, resets=batch.resets).logits, batch.targets).sum().item()
            tokens += int((batch.targets != -100).sum())
    text_bytes = sum(row.bytes for row in dataset.documents)
    assert tokens == dataset.num_tokens + len(dataset.documents)  # each document and its end
    assert found["validation_loss"] == pytest.approx(nats / tokens, rel=1e-6)
    assert found["validation_bpb"] == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-6)


def test_the_set_is_fixed_limited_and_its_bytes_exact(make_config, dataset):
    small, again = (open_validator(make_config(evaluate_tokens=200)) for _ in range(2))
    assert (small.num_tokens, small.num_bytes) == (again.num_tokens, again.num_bytes)
    assert 100 < small.num_tokens < 400
    everything = open_validator(make_config(evaluate_tokens=10**6))
    assert everything.num_bytes == sum(row.bytes for row in dataset.documents)
    assert small.num_bytes < everything.num_bytes


def test_a_stop_request_is_polled_between_batches(make_config, dataset):
    asked = iter([False, False, True])
    calls = []

    class Computer:
        def losses(self, batch):
            calls.append(batch)
            return torch.zeros(1, 16), {}

    batches = list(evaluation_batches(dataset, 16, 1, 8))[:5]
    validator = Validator(batches, np.ones(320, dtype=np.int64))
    assert validator.run(torch.nn.Linear(1, 1), Computer(), SINGLE, is_stopped=lambda: next(asked)) is None
    assert len(calls) == 2


def test_no_validation_text_is_a_data_error(make_config, tiny_data, tmp_path):
    split = {"train": 1.0, "validation": 0.0, "test": 0.0}
    data = tiny_data.config.model_validate(
        {**tiny_data.config.model_dump(mode="json"), "split": split, "output_dir": str(tmp_path / "none")}
    )
    build(data, report=lambda _: None)
    assert Path(data.output_dir).is_dir()
    with pytest.raises(DataError, match="validation split has no documents"):
        open_validator(make_config().model_copy(update={"data": data}))
