"""A frozen state: memories are read, and nothing that is read later is written into them."""

import pytest
import torch

from nested_lm.config.load import load_run
from nested_lm.nn.model import LanguageModel
from nested_lm.nn.state import iterate_tensors

RECURRENT = (
    "hope/demo",
    "hope/demo_paper",
    "hope/demo_in_context",
    "baselines/linear_attention_demo",
    "baselines/delta_net_demo",
    "baselines/gated_delta_net_demo",
    "baselines/titans_lmm_demo",
    "baselines/titans_mac_demo",
    "baselines/titans_mag_demo",
    "baselines/titans_mal_demo",
)
TOLERANCE = 2e-4  # float32, logits of order 1 over three layers


def build(preset: str) -> LanguageModel:
    model = LanguageModel(load_run(preset, ["model.width=32", "model.num_layers=1"]).model).eval()
    model.initialise(1)
    with torch.no_grad():
        model.embedding.weight.mul_(10.0)
    return model


def tokens(count: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 2048, (2, count), generator=torch.Generator().manual_seed(seed))


def fast_weights(node) -> list[torch.Tensor]:
    """Tensors of the fields that hold fast weights."""
    if not isinstance(node, tuple):
        return []
    found = []
    for name, item in zip(getattr(node, "_fields", [""] * len(node)), node, strict=True):
        if name in ("matrix", "current", "distance"):
            found += iterate_tensors(item)
        elif isinstance(item, tuple):
            found += fast_weights(item)
    return found


def of_state(state) -> list[torch.Tensor]:
    return fast_weights(state.layers) + fast_weights(state.in_context)


@pytest.mark.parametrize("preset", RECURRENT)
@torch.no_grad()
def test_a_frozen_state_keeps_its_fast_weights_and_is_still_read(preset):
    model = build(preset)
    assert model.has_fast_weights
    before = model(tokens(75, 0)).state  # not on the border of a chunk
    later = tokens(70, 1)
    frozen, thawed = model(later, state=before.freeze()), model(later, state=before)
    assert frozen.state.frozen
    assert frozen.state.position == 145
    assert of_state(before)
    for old, kept, written in zip(*map(of_state, (before, frozen.state, thawed.state)), strict=True):
        assert torch.equal(old, kept)
        assert not old.numel() or not torch.equal(old, written)
    assert not torch.allclose(frozen.logits, thawed.logits, atol=TOLERANCE)
    empty = model(later, state=model.initial_state(2).freeze())
    assert not torch.allclose(frozen.logits, empty.logits, atol=TOLERANCE)  # what was written before is read


@pytest.mark.parametrize("preset", RECURRENT)
@torch.no_grad()
def test_where_calls_end_makes_no_difference_to_a_frozen_state(preset):
    model = build(preset)
    state = model(tokens(75, 0)).state.freeze()
    later = tokens(70, 1)
    whole = model(later, state=state).logits
    parts = []
    for part in later.split([1, 20, 32, 17], dim=1):
        output = model(part, state=state)
        parts.append(output.logits)
        state = output.state
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_freezing_changes_nothing_for_attention_which_has_no_fast_weights():
    model = build("baselines/transformer_demo")
    assert not model.has_fast_weights
    state = model(tokens(20, 0)).state
    later = tokens(9, 1)
    assert torch.equal(model(later, state=state).logits, model(later, state=state.freeze()).logits)


def test_no_document_starts_in_a_frozen_state():
    model = build("hope/demo")
    resets = torch.zeros(2, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match="frozen state"):
        model(tokens(8, 0), resets=resets, state=model.initial_state(2).freeze())


@pytest.mark.parametrize("preset", ["hope/demo", "hope/demo_in_context", "baselines/transformer_demo"])
@torch.no_grad()
def test_the_last_prediction_alone_is_the_last_of_all(preset):
    model = build(preset)
    given, ends = tokens(70, 0), torch.tensor([[0, 69], [1, 69]])
    everything, last = model(given), model.predict(given, ends, state=model.initial_state(2))
    assert last.logits.shape == (1, 2, 2048)
    torch.testing.assert_close(last.logits[0], everything.logits[:, -1], atol=1e-5, rtol=0)
    for a, b in zip(iterate_tensors(everything.state.layers), iterate_tensors(last.state.layers), strict=True):
        assert torch.equal(a, b)
