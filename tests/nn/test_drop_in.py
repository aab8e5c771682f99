"""Layers as modules of any network: built in one line, cut anywhere, refused with one clear error."""

import subprocess
import sys

import pytest
import torch

import nested_lm as nl
from nested_lm.errors import ConfigError
from nested_lm.nn.state import iterate_tensors
from tests.nn.test_model import HOPE

LAYERS = {
    "self_modifying": lambda **more: nl.SelfModifyingTitans(32, num_heads=2, chunk=4, **more),
    "titans": lambda **more: nl.TitansMemory(32, chunk=4, **more),
    "gated_delta_net": lambda **more: nl.GatedDeltaNet(32, num_heads=2, **more),
    "delta_net": lambda **more: nl.DeltaNet(32, **more),
    "linear_attention": lambda **more: nl.LinearAttention(32, **more),
    "attention": lambda **more: nl.Attention(32, **more),
    "window": lambda **more: nl.Attention(32, window=5, **more),
    "continuum": lambda: nl.ContinuumMemory(32),
    "hope_block": lambda **more: nl.HopeBlock(32, chunk=4, **more),
}


def vectors(tokens, *, rows=2, dtype=torch.float64):
    return torch.randn(rows, tokens, 32, dtype=dtype, generator=torch.Generator().manual_seed(tokens))


@pytest.fixture
def layer():
    return nl.SelfModifyingTitans(32, num_heads=2, chunk=4)


@pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS.keys())
class TestEveryLayer:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
    def test_a_stream_cut_anywhere_equals_one_call(self, build, dtype):
        layer, x = build().to(dtype), vectors(11, dtype=dtype)
        whole, end = layer(x)
        state, parts = None, []
        for part in x.split([1, 5, 2, 3], dim=1):
            y, state = layer(part, state)
            parts.append(y)
        limit = {torch.float32: 1e-4, torch.float64: 1e-11, torch.bfloat16: 0.2}[dtype]
        assert whole.dtype == dtype
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=limit)
        assert state.position == end.position == 11

    def test_gradients_reach_every_weight_and_the_input(self, build):
        layer, x = build(), vectors(9, dtype=torch.float32).requires_grad_()
        first, state = layer(x)
        second, _ = layer(x, state)
        (first + second).square().sum().backward()
        gradients = [x.grad, *(parameter.grad for parameter in layer.parameters())]
        assert all(gradient is not None and bool(gradient.isfinite().all()) for gradient in gradients)

    def test_eval_changes_nothing(self, build):
        layer, x = build(), vectors(6, dtype=torch.float32)
        assert torch.equal(layer.train()(x).y, layer.eval()(x).y)

    def test_documents_see_nothing_of_those_before(self, build):
        layer, x = build().double(), vectors(12)
        resets = torch.zeros(2, 12, dtype=torch.bool)
        resets[:, 8] = True
        alone, _ = layer(x[:, 8:])
        torch.testing.assert_close(layer(x, resets=resets).y[:, 8:], alone, rtol=0, atol=1e-10)


class TestStates:
    def test_a_call_leaves_its_state_as_it_was(self, layer):
        state = layer(vectors(5, dtype=torch.float32)).state
        before = [tensor.clone() for tensor in iterate_tensors(state.layers)]
        layer(vectors(6, dtype=torch.float32), state)
        assert all(map(torch.equal, before, iterate_tensors(state.layers)))

    def test_a_frozen_state_is_read_and_not_written(self, layer):
        state = layer(vectors(8, dtype=torch.float32)).state.freeze()
        after = layer(vectors(5, dtype=torch.float32), state).state
        kept = zip(iterate_tensors(state.layers[0].memory), iterate_tensors(after.layers[0].memory), strict=True)
        assert all(torch.equal(now, then) for now, then in kept)


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        ("build", "message"),
        [
            (lambda: nl.SelfModifyingTitans(32, num_head=2), r"(?s)SelfModifyingTitans.*did you mean `num_heads`"),
            (
                lambda: nl.GatedDeltaNet(100, num_heads=3),
                r"width 100 is not a multiple of num_heads 3; try num_heads=2",
            ),
            (lambda: nl.Attention(32, num_heads=32), "head width 1 .* is odd"),
            (lambda: nl.ContinuumMemory(32, periods=(2, 3)), "(?s)ContinuumMemory.*do not nest"),
            (lambda: nl.HopeBlock(32.0), "width is 32.0, and must be a whole number"),
        ],
    )
    def test_settings(self, build, message):
        with pytest.raises(ConfigError, match=message):
            build()

    @pytest.mark.parametrize(
        ("x", "error", "message"),
        [
            (torch.ones(2, 3, 32, dtype=torch.long), TypeError, "floating-point .* torch.int64; embed token ids"),
            (torch.ones(2, 3, 31), ValueError, r"reads \(B, T, 32\), and x has the shape \(2, 3, 31\)"),
            (torch.ones(3, 32), ValueError, r"the shape \(3, 32\)"),
            (torch.ones(2, 0, 32), ValueError, "no tokens"),
            (torch.ones(2, 3, 32).double(), ValueError, r"x is torch.float64 .* use layer.to\(x\)"),
            (
                torch.ones(2, 3, 32).index_fill(1, torch.tensor(2), torch.nan),
                ValueError,
                "not finite at row 0, token 2",
            ),
        ],
        ids=["integers", "width", "dimensions", "empty", "type", "nan"],
    )
    def test_inputs(self, layer, x, error, message):
        with pytest.raises(error, match=message):
            layer(x)

    def test_states_of_others(self, layer):
        x = vectors(4, dtype=torch.float32)
        with pytest.raises(ValueError, match=r"mixer.chunk is 2 there and 4 here"):
            layer(x, nl.SelfModifyingTitans(32, num_heads=2, chunk=2)(x).state)
        with pytest.raises(ValueError, match="2 rows of tokens and 3 streams"):
            layer(x, layer.initial_state(3))
        with pytest.raises(TypeError, match="state is a Tensor"):
            layer(x, x)

    def test_a_document_inside_a_chunk(self, layer):
        resets = torch.zeros(2, 8, dtype=torch.bool)
        resets[1, 6] = True
        with pytest.raises(ValueError, match=r"row 1 starts a document at token 6 .* inside a chunk of 4"):
            layer(vectors(8, dtype=torch.float32), resets=resets)


def test_a_model_is_initialised_when_it_is_built():
    config = nl.ModelConfig.model_validate(HOPE)
    one, other = nl.LanguageModel(config, seed=3), nl.LanguageModel(config, seed=None)
    other.initialise(3)
    assert bool(nl.LanguageModel(config)(torch.zeros(1, 4, dtype=torch.long)).logits.isfinite().all())
    assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


def test_the_package_imports_without_torch():
    code = (
        "import sys, nested_lm; assert 'torch' not in sys.modules; nested_lm.HopeBlock; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_every_public_name_is_there():
    assert all(getattr(nl, name).__name__ == name for name in nl.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Hope'"):
        nl.Hope  # noqa: B018
