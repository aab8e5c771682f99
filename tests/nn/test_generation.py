"""Sampling: its filters against worked numbers, its seed, its memory."""

import pytest
import torch

from nested_lm.nn.generation import generate, next_token_probabilities
from tests.nn.test_model import HOPE, TRANSFORMER, build, tokens


def sample(model, prompt, seed=0, **kwargs):
    settings = {"max_new_tokens": 9, "temperature": 1.0, "top_p": 1.0, "top_k": 0} | kwargs
    return generate(model, prompt, generator=torch.Generator().manual_seed(seed), **settings).tokens


def test_filters_against_worked_numbers():
    logits = torch.tensor([[0.1, 0.5, 0.4]]).log()
    plain = next_token_probabilities(logits, temperature=1.0, top_p=1.0, top_k=0)
    torch.testing.assert_close(plain, torch.tensor([[0.1, 0.5, 0.4]]))
    nucleus = next_token_probabilities(logits, temperature=1.0, top_p=0.6, top_k=0)
    torch.testing.assert_close(nucleus, torch.tensor([[0.0, 5 / 9, 4 / 9]]))
    top = next_token_probabilities(logits, temperature=1.0, top_p=1.0, top_k=1)
    torch.testing.assert_close(top, torch.tensor([[0.0, 1.0, 0.0]]))
    cold = next_token_probabilities(logits, temperature=0.5, top_p=1.0, top_k=0)
    torch.testing.assert_close(cold, torch.tensor([[0.01, 0.25, 0.16]]) / 0.42)
    greedy = next_token_probabilities(logits, temperature=0.0, top_p=1.0, top_k=0)
    torch.testing.assert_close(greedy, torch.tensor([[0.0, 1.0, 0.0]]))


@pytest.mark.parametrize("settings", [HOPE, TRANSFORMER], ids=["hope", "transformer"])
def test_greedy_text_is_what_whole_passes_give(settings):
    model, prompt = build(settings), tokens(2, 5)
    found = sample(model, prompt, temperature=0.0)
    text = prompt
    for _ in range(9):
        text = torch.cat([text, model(text).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, text[:, 5:])


def test_a_seed_is_a_text():
    model, prompt = build(HOPE), tokens(1, 5)
    assert torch.equal(sample(model, prompt, seed=3), sample(model, prompt, seed=3))
    assert not torch.equal(sample(model, prompt, seed=3), sample(model, prompt, seed=4))


def test_nothing_is_generated_on_request():
    assert sample(build(HOPE), tokens(2, 5), max_new_tokens=0).shape == (2, 0)


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}])
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="allowed are"):
        sample(build(HOPE), tokens(1, 5), **wrong)


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="the prompt is empty"):
        sample(build(HOPE), tokens(1, 0))
