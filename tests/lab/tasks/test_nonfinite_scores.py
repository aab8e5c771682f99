"""A score that is not finite is refused with its place in the model."""

import numpy as np
import pytest
import torch

from nested_lm.config.model import ModelConfig
from nested_lm.errors import NumericsError
from nested_lm.nn.model import LanguageModel
from nested_lm.reading import calls
from nested_lm.reading.held_out import score_streaming
from nested_lm.reading.reader import Reader, Scored
from tests.nn.test_model import HOPE


@pytest.fixture
def overflowing():
    """A model whose layer 1 makes an infinity of token 7, wherever it stands."""
    model = LanguageModel(ModelConfig.model_validate(HOPE))
    model.initialise(0)
    read = []
    model.embedding.register_forward_hook(lambda _module, given, _output: read.append(given[0]))

    def spoil(_module, _given, output):
        return output.masked_fill((read[-1] == 7)[..., None], float("inf"))

    model.blocks[1].channel.register_forward_hook(spoil)
    return model.eval()


def test_streaming_names_layer_row_and_token(overflowing, monkeypatch):
    monkeypatch.setattr(calls, "SEGMENT_TOKENS", 4)
    documents = [np.array([5, 6, 8, 9, 10, 7, 11, 12]), np.array([5, 6, 8])]
    with pytest.raises(NumericsError, match=r"layer 1, channel, row 0, token 2 \(token 6 of the stream\)"):
        score_streaming(overflowing, documents, batch_size=2)


def test_answers_name_layer_and_token(overflowing):
    sequences = [(Scored(np.array([1, 2, 3, 4, 5]), 4),), (Scored(np.array([1, 2, 3, 7, 6]), 4),)]
    with pytest.raises(NumericsError, match=r"layer 1, channel, row 0, token 3 \(token 3 of the stream\)"):
        Reader(overflowing).score(sequences)


def test_sound_scores_pass():
    model = LanguageModel(ModelConfig.model_validate(HOPE))
    model.initialise(0)
    scores = score_streaming(model, [np.array([5, 7, 8])], batch_size=1)
    assert torch.isfinite(torch.from_numpy(scores.nats)).all()
