"""Sampling: its filters against worked numbers, its seed, its memory."""

import pytest
import torch

from nested_lm.errors import NumericsError
from nested_lm.nn.state import iterate_tensors
from nested_lm.reading import calls
from nested_lm.reading.generation import generate, next_token_probabilities
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


class TestStreams:
    @pytest.mark.parametrize("settings", [HOPE, TRANSFORMER], ids=["hope", "transformer"])
    def test_going_on_from_a_state_is_one_pass_over_both_texts(self, settings):
        model, read, prompt = build(settings), tokens(2, 13), tokens(2, 6, seed=1)
        with torch.no_grad():
            state = model(read).state
        before = [tensor.clone() for tensor in iterate_tensors(state.layers)]
        found = sample(model, prompt, temperature=0.0, state=state)
        assert torch.equal(found, sample(model, torch.cat([read, prompt], dim=1), temperature=0.0))
        assert all(map(torch.equal, iterate_tensors(state.layers), before))

    @pytest.mark.parametrize("settings", [HOPE, TRANSFORMER], ids=["hope", "transformer"])
    def test_a_long_prompt_is_read_in_segments(self, settings, monkeypatch):
        model, prompt = build(settings), tokens(2, 45)
        whole = sample(model, prompt, temperature=0.0)
        lengths, predict = [], model.predict
        monkeypatch.setattr(calls, "SEGMENT_TOKENS", 16)
        monkeypatch.setattr(
            model, "predict", lambda ids, *given, **how: lengths.append(ids.shape[1]) or predict(ids, *given, **how)
        )
        assert torch.equal(sample(model, prompt, temperature=0.0), whole)
        assert lengths == [16, 16, 13] + [1] * 8

    def test_the_state_is_that_before_the_last_token(self):
        model, prompt = build(HOPE), tokens(2, 5)
        generated = generate(
            model,
            prompt,
            max_new_tokens=4,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            generator=torch.Generator().manual_seed(0),
        )
        expected = model(torch.cat([prompt, generated.tokens[:, :-1]], dim=1)).state
        assert generated.state.position == expected.position == 8
        for one, other in zip(iterate_tensors(generated.state.layers), iterate_tensors(expected.layers), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
        # Not a tensor of inference mode, which no later pass could be differentiated through.
        model(generated.tokens[:, -1:], state=generated.state).logits.sum().backward()

    def test_it_stops_when_every_row_has_drawn_the_token(self):
        model, prompt = build(HOPE), tokens(3, 5)
        plain = sample(model, prompt, max_new_tokens=60)
        stop = int(plain[0, 4])
        first = [row.index(stop) if stop in row else 60 for row in plain.tolist()]
        found = sample(model, prompt, max_new_tokens=60, stop=stop)
        assert torch.equal(found, plain[:, : max(first) + 1])
        alone = sample(model, prompt[:1], max_new_tokens=60)[0].tolist()
        assert (
            sample(model, prompt[:1], max_new_tokens=60, stop=alone[5])[0].tolist()
            == alone[: alone.index(alone[5]) + 1]
        )


class TestPredictionsThatAreNotFinite:
    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    @pytest.mark.parametrize("drawn", [0, 4])
    def test_are_an_error_and_never_a_token(self, temperature, drawn):
        model = build(HOPE)
        first = 5 + drawn

        def hook(_module, given, output):
            values = output[0].clone()
            here = range(place[0], place[0] + values.shape[1])
            if first - 1 in here:
                values[0, here.index(first - 1)] = float("nan")
            return (values, *output[1:])

        place, original = [0], model._run

        def run(ids, resets, state, wish):
            place[0] = state.position
            return original(ids, resets, state, wish)

        model._run = run
        model.blocks[1].mixer.register_forward_hook(hook)
        with pytest.raises(
            NumericsError, match=rf"layer 1, mixer.*token {first - 1} of the stream(?s:.*)Nothing was drawn"
        ):
            sample(model, tokens(2, 5), temperature=temperature)

    def test_weights_that_are_not_finite_are_named(self):
        model = build(TRANSFORMER)
        with torch.no_grad():
            model.blocks[0].mixer.out.weight[0, 0] = float("nan")
        with pytest.raises(NumericsError, match=r"parameter blocks.0.mixer.out.weight"):
            sample(model, tokens(1, 5))
