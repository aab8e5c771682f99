"""A converted Llama whose levels are written while it reads: the original at rate 0, and what it reads at others."""

import pytest
import torch

from nested_lm.checkpoint import find_checkpoint, load_model
from nested_lm.conversion.convert import convert
from nested_lm.nn.model import token_losses

LIMIT = 1e-5  # relative to the largest logit, float32


def overrides(rate):
    writes = [f"{{period_tokens: {period}, rate: {rate}, rule: {{kind: gd}}}}" for period in (8, 32)]
    return [
        "model.channel.in_context={lifetime: document, meta_gradient: first_order}",
        *(f"model.channel.levels.{level}.in_context={text}" for level, text in enumerate(writes)),
    ]


@pytest.fixture
def adapting(make_llama, tmp_path):
    """A Llama, and the model made of it whose levels are written at a rate: `adapting(0.1)`."""
    original, folder = make_llama(tie_word_embeddings=True)

    def make(rate):
        output = tmp_path / f"rate-{rate}"
        convert(str(folder), output, overrides(rate), periods=(1024, 2048))
        return original, load_model(find_checkpoint(output), device="cpu").model

    return make


def tokens(*shape):
    return torch.randint(0, 300, shape, generator=torch.Generator().manual_seed(2))


def relative(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def test_at_rate_0_it_is_the_original(adapting):
    original, model = adapting(0.0)
    ids = tokens(2, 61)
    with torch.no_grad():
        expected = original(ids).logits
        assert relative(model(ids).logits, expected) < LIMIT
        first = model(ids[:, :21])
        second = model(ids[:, 21:], state=first.state)
    assert relative(torch.cat([first.logits, second.logits], dim=1), expected) < LIMIT


def test_at_other_rates_it_is_the_original_until_the_first_write_and_learns_from_then_on(adapting):
    original, model = adapting(0.02)
    ids = tokens(1, 16).repeat(1, 4)  # read once, it is known
    with torch.no_grad():
        expected, found = original(ids).logits, model(ids).logits
    # The first period is written once its last target, the first token of the next, has been read.
    assert relative(found[:, :8], expected[:, :8]) < LIMIT
    assert relative(found[:, 8:], expected[:, 8:]) > 100 * LIMIT
    before, after = (token_losses(logits[:, :-1], ids[:, 1:])[:, 48:].mean() for logits in (expected, found))
    assert after < before - 0.1


def test_a_stream_cut_anywhere_is_written_alike(adapting):
    _, model = adapting(0.02)
    ids = tokens(2, 45)
    with torch.no_grad():
        whole = model(ids).logits
        for cut in (7, 8, 9, 33):
            first = model(ids[:, :cut])
            second = model(ids[:, cut:], state=first.state)
            assert relative(torch.cat([first.logits, second.logits], dim=1), whole) < LIMIT
