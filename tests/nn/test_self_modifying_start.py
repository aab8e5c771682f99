"""How the self-modifying memories start: first layers, gates, rates."""

import pytest
import torch

from nested_lm.config.mixers import SelfModifying
from nested_lm.nn.layers import StepContext
from nested_lm.nn.mixers.self_modifying import START_INNER_SCALE, SelfModifyingTitans, scramble


def start(**options):
    config = SelfModifying.model_validate({"kind": "self_modifying", "num_heads": 4, "head_width": 16} | options)
    mixer = SelfModifyingTitans(32, config, epsilon=1e-6, recompute=False)
    generator = torch.Generator().manual_seed(0)
    mixer.initialise(lambda tensor, std: tensor.copy_(torch.randn(tensor.shape, generator=generator) * std))
    return mixer


@pytest.mark.parametrize("expansion", [0.5, 1.0, 2.0])
def test_first_layers_are_orthogonal(expansion):
    inner = start(expansion=expansion).start_inner.detach()
    product = inner.mT @ inner if expansion >= 1 else inner @ inner.mT
    assert torch.allclose(product, START_INNER_SCALE**2 * torch.eye(product.shape[-1]).expand_as(product), atol=1e-4)


def test_hidden_activations_of_unit_keys_start_near_unit_length():
    inner = start(head_width=32).start_inner.detach()
    keys = torch.nn.functional.normalize(torch.randn(512, 32, generator=torch.Generator().manual_seed(1)), dim=-1)
    length = torch.nn.functional.silu(keys @ inner.mT).norm(dim=-1)
    assert 0.6 < length.min() < length.max() < 1.5
    assert abs(length.mean() - 1) < 0.1


def test_output_gates_start_at_one():
    assert torch.nn.functional.silu(start().output_gate.bias).sub(1).abs().max() < 1e-4


def test_half_of_the_heads_stay_at_rates_up_to_one():
    mixer = start()
    assert mixer.config.rate_shares == mixer.rule.rate_shares == (0.5, 1.0)
    assert start(rates={"memory": 1.0}).rule.rate_shares == (1.0,)
    assert start(num_heads=1).rule.rate_shares == (1.0,)
    assert torch.allclose(mixer.gate_bias[:4].sigmoid(), torch.full((4,), 0.5))  # half of what each may reach


def test_what_is_left_open_is_written_down():
    assert start().config.erase_since == "border"
    assert start(erase="none", rates={"memory": 0.1}).config.erase_since == "start"
    assert start(depth=1, objective="dot").config.erase_since == "start"


def test_flat_gates_start_alike_for_every_token():
    gates = start(flat_gates=["output", "decay"])
    assert not gates.output_gate.weight.any()
    rate, decay = gates.gates.weight.chunk(2)
    assert rate.all()
    assert not decay.any()
    assert not start(flat_gates=["rate"]).gates.weight.chunk(2)[0].any()
    with pytest.raises(ValueError, match="no decay gate"):
        start(flat_gates=["decay"], retention="full", adapt=["memory"])


def test_scrambled_values_are_permuted_by_position_wherever_the_stream_is_cut():
    value = torch.randn(2, 90, 3, 16, generator=torch.Generator().manual_seed(1))
    scrambled = scramble(value, 7)
    assert torch.equal(scrambled.sort(-1)[0], value.sort(-1)[0])
    assert torch.equal(torch.cat([scramble(value[:, :50], 7), scramble(value[:, 50:], 57)], dim=1), scrambled)
    same = torch.arange(16.0).expand(1, 64, 1, 16)
    assert len({tuple(row) for row in scramble(same, 0)[0, :, 0].tolist()}) == 64


def test_controls_change_what_is_read():
    config = {"kind": "self_modifying", "num_heads": 2, "head_width": 8, "chunk": 4, "backend": "torch"}
    x = torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(2))
    read = []
    for control in (None, "scrambled_values", "queries_are_keys"):
        section = SelfModifying.model_validate(config | {"control": control})
        mixer = SelfModifyingTitans(16, section, epsilon=1e-6, recompute=False)
        torch.nn.init.normal_(mixer.qkv.weight, generator=torch.Generator().manual_seed(3))
        generator = torch.Generator().manual_seed(0)
        mixer.initialise(
            lambda tensor, std, draw=generator: tensor.copy_(torch.randn(tensor.shape, generator=draw) * std)
        )
        for layer in (mixer.gates, mixer.output_gate, mixer.out):
            torch.nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(4))
        read.append(mixer(x, StepContext(0, None, None), mixer.initial_state(1))[0])
    assert not torch.allclose(read[0], read[1])
    assert not torch.allclose(read[0], read[2])
