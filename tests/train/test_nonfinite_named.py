"""A run that is given up over values that are not finite says where in the model the first one arose."""

import pytest
import torch

from nested_lm.errors import NumericsError
from nested_lm.nn.mixers.self_modifying import SelfModifyingTitans
from nested_lm.train.trainer import train


def test_layer_memory_and_token_are_named(make_config, monkeypatch):
    """The starts of layer 1's v memory are near the largest float: its first write overflows."""
    original = SelfModifyingTitans.initialise
    seen = []

    def initialise(self, normal):
        original(self, normal)
        seen.append(self)
        if len(seen) == 2:
            with torch.no_grad():
                self.start_inner[0, self.rule.index("v")] = 3e38

    monkeypatch.setattr(SelfModifyingTitans, "initialise", initialise)
    with pytest.raises(
        NumericsError, match=r"first seen in micro-batch 0, layer 1, mixer, memory .*v.*, row 0, token 0"
    ):
        train(make_config("hope", max_nonfinite_steps=1))


def test_a_forward_pass_without_a_fault_says_so(make_config, monkeypatch):
    from nested_lm.train import step

    original = step.token_losses
    monkeypatch.setattr(step, "token_losses", lambda *given: original(*given) * float("nan"))
    with pytest.raises(NumericsError, match="every value of the forward pass is finite"):
        train(make_config("transformer", max_nonfinite_steps=0))
