"""Attention whose queries share keys and values, and the rotary angles of Llama 3. Float64."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional

from nested_lm.config.mixers import FullAttention
from nested_lm.nn.layers import StepContext, rotate
from nested_lm.nn.mixers.attention import Attention

LIMIT = 1e-12
LLAMA3 = {"kind": "llama3", "factor": 8.0, "low_frequency": 1.0, "high_frequency": 4.0, "original_context": 64}


def build(num_kv_heads, **settings):
    config = FullAttention(kind="attention", num_heads=4, num_kv_heads=num_kv_heads, **settings)
    mixer = Attention(16, config).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return mixer


def run(mixer, x, *, start=0, state=None, documents=None):
    state = mixer.initial_state(x.shape[0]) if state is None else state
    return mixer(x, StepContext(start, None, documents), state)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_shared_keys_equal_the_same_keys_given_to_every_query(num_kv_heads):
    shared, x = build(num_kv_heads), torch.randn(2, 9, 16, dtype=torch.float64)
    full = build(None)
    q, k, v = shared.qkv.weight.split([16, 4 * num_kv_heads, 4 * num_kv_heads])
    repeats = 4 // num_kv_heads
    k, v = (w.view(num_kv_heads, 4, 16).repeat_interleave(repeats, dim=0).reshape(16, 16) for w in (k, v))
    full.load_state_dict({"qkv.weight": torch.cat([q, k, v]), "out.weight": shared.out.weight})
    torch.testing.assert_close(run(shared, x)[0], run(full, x)[0], rtol=LIMIT, atol=LIMIT)


@pytest.mark.parametrize("cut", [1, 4, 8])
def test_a_stream_with_shared_keys_can_be_cut(cut):
    mixer, x = build(2, rope_scaling=LLAMA3), torch.randn(2, 9, 16, dtype=torch.float64)
    whole = run(mixer, x)[0]
    first, state, _ = run(mixer, x[:, :cut])
    second, state, _ = run(mixer, x[:, cut:], start=cut, state=state)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, rtol=LIMIT, atol=LIMIT)
    assert state.keys.shape == (2, 2, 9, 4)


def test_documents_with_shared_keys_do_not_see_each_other():
    mixer, x = build(2), torch.randn(1, 8, 16, dtype=torch.float64)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    packed = run(mixer, x, documents=documents)[0]
    torch.testing.assert_close(packed[:, 3:], run(mixer, x[:, 3:])[0], rtol=LIMIT, atol=LIMIT)


def test_without_sharing_the_weights_keep_their_shape():
    assert build(None).qkv.weight.shape == (48, 16)
    assert build(1).qkv.weight.shape == (24, 16)


def test_scaled_angles_are_kept_divided_and_blended():
    config = FullAttention(kind="attention", num_heads=1, rope_scaling=LLAMA3)
    base, width = 10_000.0, 8  # waves of 6.3, 62.8, 628 and 6283 tokens; fast below 16, slow above 64
    x = torch.ones(1, 1, 2, width, dtype=torch.float64)
    turned = rotate(x, 0, base, config.rope_scaling)[0, 0, 1]
    angles = torch.atan2((turned[4:] - turned[:4]) / 2, (turned[4:] + turned[:4]) / 2)
    keep = (64 * 0.1 / (2 * math.pi) - 1) / 3
    expected = [1.0, 0.1 * ((1 - keep) / 8 + keep), 0.01 / 8, 0.001 / 8]
    torch.testing.assert_close(angles, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)


def test_plain_angles_are_powers_of_the_base():
    x = torch.ones(1, 1, 3, 8, dtype=torch.float64)
    turned = functional.normalize(rotate(x, 5, 10_000.0)[0, 0, 2].view(2, 4), dim=0)
    angle = 7 * torch.tensor([1.0, 0.1, 0.01, 0.001], dtype=torch.float64)
    expected = torch.stack([angle.cos() - angle.sin(), angle.cos() + angle.sin()]) / math.sqrt(2)
    torch.testing.assert_close(turned, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("heads", "near"), [(3, 2), (5, 4), (8, 4)])
def test_key_heads_that_do_not_divide_are_refused(heads, near):
    with pytest.raises(
        ValidationError, match=rf"num_kv_heads {heads} does not divide num_heads 4.*num_kv_heads={near}"
    ):
        FullAttention(kind="attention", num_heads=4, num_kv_heads=heads)


def test_bands_out_of_order_are_refused():
    with pytest.raises(ValidationError, match="high_frequency 1 must be above low_frequency 1"):
        FullAttention(kind="attention", num_heads=4, rope_scaling=LLAMA3 | {"high_frequency": 1.0})
