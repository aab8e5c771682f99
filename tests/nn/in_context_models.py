"""Small models whose levels are written in context, shared by the tests of clock B."""

import torch

from nested_lm.config.model import ModelConfig
from nested_lm.nn.model import LanguageModel, token_losses

MIXERS = {
    "attention": {"kind": "attention", "num_heads": 2},
    "self_modifying": {"kind": "self_modifying", "num_heads": 2, "head_width": 4, "chunk": 4},
}


def writes(period, rate, rule=None):
    return {"period_tokens": period, "rate": rate, "rule": rule or {"kind": "gd"}}


def settings(
    mixer="attention",
    *,
    wiring="sequential",
    lifetime="document",
    order="first_order",
    rule=None,
    rates=(0.3, 0.2),
    **changes,
):
    """Two layers; of three levels the middle one is not written in context. rule: of both others, or one for each."""
    rules = rule if isinstance(rule, tuple) else (rule, rule)
    levels = [
        {"period_tokens": 64, "expansion": 1.5, "in_context": writes(4, rates[0], rules[0])},
        {"period_tokens": 128, "expansion": 1.0},
        {"period_tokens": 256, "expansion": 2.0, "in_context": writes(8, rates[1], rules[1])},
    ]
    return {
        "vocab_size": 23,
        "width": 8,
        "num_layers": 2,
        "mixer": MIXERS[mixer],
        "init_std": 0.3,  # so that the losses, and with them the writes, are not small
        "channel": {
            "kind": "cms",
            "wiring": wiring,
            "levels": levels,
            "in_context": {"lifetime": lifetime, "meta_gradient": order},
        },
    } | changes


def layer_levels():
    """Each layer's SwiGLU belongs to a level."""
    return settings() | {
        "num_layers": 3,
        "channel": {
            "kind": "layer_levels",
            "hidden": 10,
            "levels": [
                {"period_tokens": 64, "in_context": writes(4, 0.3)},
                {"period_tokens": 128, "in_context": writes(12, 0.2)},
            ],
            "in_context": {"lifetime": "document", "meta_gradient": "first_order"},
        },
    }


def build(given, dtype=torch.float64, seed=0, **kwargs):
    model = LanguageModel(ModelConfig.model_validate(given), **kwargs).to(dtype)
    model.initialise(seed)
    return model


def tokens(*shape, seed=0):
    return torch.randint(0, 23, shape, generator=torch.Generator().manual_seed(seed))


def relative(found, expected):
    """Largest error beside the largest value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def finite_difference(model, ids, resets):
    """Directional derivative of the loss, by the gradient and by differences of the loss.

    Rates are small: an inner gradient has a kink where a hidden unit turns on, and large writes pass many of them.
    """
    parameters = list(model.parameters())

    def loss():
        return token_losses(model(ids[:, :-1], resets=resets).logits, ids[:, 1:]).mean()

    found = torch.autograd.grad(loss(), parameters)
    generator = torch.Generator().manual_seed(4)
    directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    values = []
    step = 1e-7  # the error of the difference itself falls with its square: at 1e-6 up to 1e-5 of the derivative
    with torch.no_grad():
        for sign in (1, -2):
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter += sign * step * direction
            values.append(loss().item())
    expected = (values[0] - values[1]) / (2 * step)
    return sum((g * d).sum() for g, d in zip(found, directions, strict=True)).item(), expected
