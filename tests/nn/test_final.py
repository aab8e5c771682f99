"""A call after which the streams end: the same predictions, nothing to go on from, and forks without a copy."""

import pytest
import torch

from nested_lm.config.load import load_run
from nested_lm.nn.model import LanguageModel
from nested_lm.nn.state import iterate_tensors
from tests.nn.test_frozen import RECURRENT

PRESETS = (*RECURRENT, "baselines/transformer_demo", "baselines/sliding_window_demo")
ROWS = torch.tensor([2, 0, 0, 1, 0])
TOLERANCE = 1e-5  # float32: products of other batches


def build(preset: str, *overrides: str) -> LanguageModel:
    model = LanguageModel(load_run(preset, ["model.width=32", "model.num_layers=2", *overrides]).model).eval()
    model.initialise(1)
    with torch.no_grad():
        model.embedding.weight.mul_(10.0)
    return model


def tokens(rows: int, count: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 2048, (rows, count), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("count", [1, 7, 70])  # a piece of a chunk; over several borders
@torch.no_grad()
def test_predicts_what_selected_rows_predict(preset, count):
    model = build(preset)
    state = model(tokens(3, 41, 0)).state
    held = [tensor.clone() for tensor in iterate_tensors(state.layers)]
    later = tokens(5, count, 1)
    expected = model(later, state=state.select(ROWS)).logits
    found = model.predict(later, None, state=state, rows=ROWS, final=True)
    torch.testing.assert_close(found.logits, expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert found.state is state
    assert all(torch.equal(a, b) for a, b in zip(held, iterate_tensors(state.layers), strict=True))


@pytest.mark.parametrize("preset", ["hope/demo", "hope/demo_in_context", "baselines/titans_mac_demo"])
@torch.no_grad()
def test_of_rows_that_go_on_from_themselves(preset):
    model = build(preset)
    state = model(tokens(2, 41, 0)).state
    later = tokens(2, 130, 1)
    expected = model(later, state=state)
    torch.testing.assert_close(
        model.predict(later, None, state=state, final=True).logits, expected.logits, rtol=0, atol=TOLERANCE
    )
    found = model.predict(later, None, state=model.initial_state(2), final=True)
    torch.testing.assert_close(found.logits, model(later).logits, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("preset", ["hope/demo", *(name for name in PRESETS if "titans" in name or "window" in name)])
@torch.no_grad()
def test_of_a_frozen_state(preset):
    model = build(preset)
    state = model(tokens(3, 64, 0)).state
    later = tokens(5, 128, 1)
    frozen = state.freeze()
    expected = model(later, state=frozen.select(ROWS)).logits
    torch.testing.assert_close(
        model.predict(later, None, state=frozen, rows=ROWS, final=True).logits, expected, rtol=0, atol=TOLERANCE
    )


def test_with_gradients_rows_are_selected_and_all_gradients_are_there():
    model = build("hope/demo")
    later = tokens(5, 7, 1)
    found = []
    for options in ({"rows": ROWS, "final": True}, {}):
        state = model(tokens(3, 41, 0)).state
        state = state if options else state.select(ROWS)
        loss = model.predict(later, None, state=state, **options).logits.square().mean()
        found.append(torch.autograd.grad(loss, list(model.parameters())))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_rows_without_an_end_are_selected():
    model = build("hope/demo")
    state = model(tokens(3, 41, 0)).state
    later = tokens(5, 7, 1)
    found, expected = model.predict(later, None, state=state, rows=ROWS), model(later, state=state.select(ROWS))
    assert torch.equal(found.logits, expected.logits)
    pairs = zip(iterate_tensors(found.state.layers), iterate_tensors(expected.state.layers), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@torch.no_grad()
def test_of_rows_with_several_documents_behind_them():
    model = build("baselines/transformer_demo")
    starts = torch.zeros(3, 41, dtype=torch.bool)
    starts[1, 20] = True
    state = model(tokens(3, 41, 0), resets=starts).state
    assert state.packed
    later = tokens(5, 7, 1)
    expected = model(later, state=state.select(ROWS)).logits
    torch.testing.assert_close(
        model.predict(later, None, state=state, rows=ROWS, final=True).logits, expected, rtol=0, atol=TOLERANCE
    )


@torch.inference_mode()
def test_of_views_of_one_stream_and_other_number_types():
    model = build("hope/demo")
    state = model(tokens(1, 41, 0)).state
    later, rows = tokens(5, 7, 1), torch.zeros(5, dtype=torch.long)
    expected = model(later, state=state.select(rows)).logits
    for given in (state, state.select(torch.tensor([0, 0]))):
        found = model.predict(later, None, state=given, rows=rows, final=True).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
    found = model.double().predict(later, None, state=state, rows=rows, final=True).logits
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("final", [False, True])
@torch.no_grad()
def test_a_state_of_other_streams_is_refused(preset, final):
    """In C, memories of a row that the state does not have would be read from anywhere."""
    model = build(preset)
    state = model(tokens(3, 41, 0)).state
    with pytest.raises(
        ValueError, match="5 rows of tokens and 3 streams of the state; give each row of tokens a stream"
    ):
        model.predict(tokens(5, 7, 1), None, state=state, final=final)
    with pytest.raises(ValueError, match="5 rows of tokens and 2 entries of `rows`"):
        model.predict(tokens(5, 7, 1), None, state=state, rows=ROWS[:2], final=final)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("row", [3, -1])
@torch.no_grad()
def test_a_row_that_is_not_there_is_refused(backend, row):
    model = build("hope/demo", f"model.mixer.backend={backend}")
    state = model(tokens(3, 41, 0)).state
    with pytest.raises(IndexError):
        model.predict(tokens(2, 7, 1), None, state=state, rows=torch.tensor([0, row]), final=True)
