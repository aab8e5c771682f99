"""Delta Gradient Descent as a torch optimizer: hooks see the right rows, steps are the argmin."""

import io

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from nested_lm.optim.delta_gradient_descent import DeltaGradientDescent

EXACT = 1e-10  # float64


def network():
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3, bias=False)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def layers_of(model):
    return [model[0], model[2]]


def data(step=0, rows=12):
    generator = torch.Generator().manual_seed(step + 1)
    x = torch.randn(rows, 5, generator=generator, dtype=torch.float64)
    return x, torch.randn(rows, 3, generator=generator, dtype=torch.float64)


def loss_of(model, x, y, *, reduction="sum"):
    errors = (model(x) - y).square().sum(dim=1)
    return errors.sum() if reduction == "sum" else errors.mean()


def expected_weights(model, x, y, *, lr, reduction):
    """Minimise the objective of each layer by its normal equations, from inputs and output gradients."""
    read = [x, None]
    answers = [model[0](x), None]
    read[1] = model[1](answers[0])
    answers[1] = model[2](read[1])
    errors = (answers[1] - y).square().sum(dim=1)
    slopes = torch.autograd.grad(errors.sum(), answers)  # of each row's own loss
    share = 1.0 if reduction == "sum" else 1.0 / x.shape[0]
    found = []
    for layer, inputs, slope in zip(layers_of(model), read, slopes, strict=True):
        old, rows = layer.weight.detach(), inputs.detach()
        if layer.bias is not None:
            old = torch.cat([old, layer.bias.detach()[:, None]], dim=1)
            rows = torch.cat([rows, torch.ones(rows.shape[0], 1, dtype=torch.float64)], dim=1)
        left = share * rows.T @ rows + torch.eye(rows.shape[1], dtype=torch.float64) / lr
        right = old / lr - share * slope.T @ rows
        found.append(torch.linalg.solve(left, right.T).T)
    return found


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("lr", [0.01, 3.0])
def test_a_step_is_the_argmin_of_every_layer(reduction, lr):
    model, (x, y) = network(), data()
    expected = expected_weights(model, x, y, lr=lr, reduction=reduction)
    optimizer = DeltaGradientDescent(layers_of(model), lr=lr, reduction=reduction)
    loss_of(model, x, y, reduction=reduction).backward()
    optimizer.step()
    torch.testing.assert_close(
        torch.cat([model[0].weight, model[0].bias[:, None]], dim=1), expected[0], rtol=EXACT, atol=EXACT
    )
    torch.testing.assert_close(model[2].weight.detach(), expected[1], rtol=EXACT, atol=EXACT)


def one_step(change=lambda model, x, y: loss_of(model, x, y).backward(), step=0, optimizer=None, model=None):
    model = model or network()
    optimizer = optimizer or DeltaGradientDescent(layers_of(model), lr=0.1, reduction="sum")
    change(model, *data(step))
    optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def assert_same(left, right):
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=EXACT, atol=EXACT)


def test_accumulation_is_one_step_on_all_rows():
    def in_parts(model, x, y):
        for a, b in zip(x.chunk(3), y.chunk(3), strict=True):
            loss_of(model, a, b).backward()

    assert_same(one_step(), one_step(in_parts))


def test_mixed_precision_rounds_products_and_not_the_sums():
    """The layer answers in bfloat16; its rows are added up, and the system is solved, in float32."""

    def mixed(model, x, y):
        for a, b in zip(x.chunk(2), y.chunk(2), strict=True):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(model, a, b)
            loss.backward()

    for found, expected in zip(one_step(mixed), one_step(), strict=True):
        assert found.dtype == expected.dtype
        assert (found - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_counts_rows_once(use_reentrant):
    def recomputed(model, x, y):
        answers = checkpoint(model, x.requires_grad_(), use_reentrant=use_reentrant)
        (answers - y).square().sum().backward()

    assert_same(one_step(), one_step(recomputed))


def test_passes_without_backward_do_not_count():
    def with_validation(model, x, y):
        with torch.no_grad():
            model(x)
        loss_of(model, x, y)
        loss_of(model, x, y).backward()

    assert_same(one_step(), one_step(with_validation))


def test_cleared_rows_do_not_count():
    model = network()
    optimizer = DeltaGradientDescent(layers_of(model), lr=0.1, reduction="sum")
    loss_of(model, *data(7)).backward()
    optimizer.zero_grad()
    assert_same(one_step(), one_step(optimizer=optimizer, model=model))


def test_rows_of_any_leading_shape():
    def folded(model, x, y):
        loss_of(lambda rows: model(rows.view(3, 4, 5)).flatten(0, 1), x, y).backward()

    assert_same(one_step(), one_step(folded))


def test_a_saved_state_continues_in_the_middle_of_an_accumulation():
    x, y = data()
    whole = one_step()
    model = network()
    optimizer = DeltaGradientDescent(layers_of(model), lr=0.1, reduction="sum")
    loss_of(model, x[:5], y[:5]).backward()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    second = network()
    other = DeltaGradientDescent(layers_of(second), lr=0.5, reduction="mean")
    other.load_state_dict(torch.load(file, weights_only=True))
    for new, old in zip(second.parameters(), model.parameters(), strict=True):
        new.grad = old.grad.clone()
    loss_of(second, x[5:], y[5:]).backward()
    other.step()
    assert_same(whole, [p.detach() for p in second.parameters()])


@pytest.mark.parametrize(("curvature", "share"), [(0.5, 1 / 3), (0.9, 0.9 / 1.9)])
def test_a_large_rate_converges_where_the_curvature_is_below_one(curvature, share):
    """The fixed point W x = -g(W x): for a squared error of curvature c, W x = c / (1 + c) y."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    y = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    layer = nn.Linear(5, 4, bias=False).double()
    optimizer = DeltaGradientDescent([layer], lr=1e4, reduction="sum")

    def closure():
        optimizer.zero_grad()
        loss = 0.5 * curvature * (layer(x) - y).square().sum()
        loss.backward()
        return loss

    for _ in range(300):
        optimizer.step(closure)
    torch.testing.assert_close(layer(x).detach(), share * y, rtol=1e-3, atol=1e-3)


def test_bfloat16_layers_sum_in_float32():
    layer = nn.Linear(5, 3).bfloat16()
    optimizer = DeltaGradientDescent([layer], lr=0.1, reduction="sum")
    layer(torch.randn(7, 5).bfloat16()).float().square().sum().backward()
    assert optimizer.state[layer.weight]["second_moment"].dtype == torch.float32
    optimizer.step()
    assert layer.weight.dtype == torch.bfloat16


def test_weight_decay_is_decoupled():
    model, (x, y) = network(), data()
    shrunk = network()
    with torch.no_grad():
        for parameter in shrunk.parameters():
            parameter.mul_(1 - 0.1 * 0.5)
    optimizer = DeltaGradientDescent(layers_of(model), lr=0.1, reduction="sum", weight_decay=0.5)
    plain = DeltaGradientDescent(layers_of(shrunk), lr=0.1, reduction="sum")
    loss_of(model, x, y).backward()
    loss_of(network(), x, y)
    for (a, b), layer in zip(zip(model.parameters(), shrunk.parameters(), strict=True), [0, 0, 2], strict=True):
        b.grad = a.grad.clone()
        plain.state[shrunk[layer].weight].update(optimizer.state[model[layer].weight])
    optimizer.step()
    plain.step()
    assert_same([p.detach() for p in model.parameters()], [p.detach() for p in shrunk.parameters()])


def test_mistakes_are_refused():
    model = network()
    with pytest.raises(ValueError, match="'sum' or 'mean'"):
        DeltaGradientDescent(layers_of(model), lr=0.1, reduction="average")
    with pytest.raises(ValueError, match=r"lr is -0\.1"):
        DeltaGradientDescent(layers_of(model), lr=-0.1, reduction="sum")
    with pytest.raises(ValueError, match=r"nn\.Linear layers only; got Tanh"):
        DeltaGradientDescent(model, lr=0.1, reduction="sum")
    loss_of(model, *data()).backward()
    late = DeltaGradientDescent(layers_of(model), lr=0.1, reduction="sum")
    with pytest.raises(RuntimeError, match="make the optimizer before the forward pass"):
        late.step()
    late.remove_hooks()
    loss_of(model, *data()).backward()
    assert not late.state
