"""`torch.compile` of the model: traced (without generating code, which takes minutes), it computes what eager does."""

import pytest
import torch

from nested_lm.nn.model import token_losses
from tests.nn.test_model import HOPE, HOPE_IN_TORCH, TRANSFORMER, build, tokens


@pytest.mark.filterwarnings("default")  # the tracer looks at tensors in ways that torch itself warns of
@pytest.mark.parametrize("settings", [HOPE, HOPE_IN_TORCH, TRANSFORMER], ids=["hope", "hope-torch", "transformer"])
def test_a_traced_model_gives_the_same_loss_and_gradients(settings):
    ids = tokens(2, 17)
    found = []
    for compiled in (False, True):
        model = build(settings | {"num_layers": 1})
        called = torch.compile(model, backend="eager") if compiled else model
        loss = token_losses(called(ids[:, :-1]).logits, ids[:, 1:]).mean()
        loss.backward()
        found.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    for eager, traced in zip(*found, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("default")
@pytest.mark.filterwarnings("error:Dynamo detected")  # what is not for the tracer is kept from it
@pytest.mark.parametrize("settings", [HOPE, HOPE_IN_TORCH], ids=["hope", "hope-torch"])
@torch.no_grad()
def test_a_traced_last_call_gives_the_same_predictions(settings):
    model = build(settings | {"num_layers": 1})
    state, rows = model(tokens(2, 17)).state, torch.tensor([1, 0, 0])
    later = tokens(3, 5)
    expected = model.predict(later, None, state=state, rows=rows, final=True).logits
    found = torch.compile(model.predict, backend="eager")(later, None, state=state, rows=rows, final=True).logits
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
