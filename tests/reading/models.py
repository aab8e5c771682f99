"""Small models of every mixer, and of levels that are written in context, with vocabulary 61."""

import numpy as np
import torch

from nested_lm.config.model import ModelConfig
from nested_lm.nn.model import LanguageModel
from nested_lm.reading.calls import TokenScores
from nested_lm.reading.identity import identify
from nested_lm.reading.reader import Scored
from nested_lm.reading.stream import Boundary

BOUNDARY = Boundary(start=0, end=0)
MIB = 1 << 20

_SWIGLU = {"kind": "swiglu", "expansion": 2.0}
_HOPE = {"kind": "self_modifying", "num_heads": 2, "head_width": 6, "chunk": 4}
_TITANS = _HOPE | {
    "adapt": ["memory"],
    "targets": "values",
    "erase": "none",
    "momentum": "sum",
    "rates": {"memory": 0.1},
}
_HYBRID = {"num_heads": 2, "num_persistent": 2, "memory": _TITANS}


def _levels(period, rule):
    return {
        "kind": "cms",
        "levels": [
            {
                "period_tokens": 64,
                "expansion": 1.5,
                "in_context": {"period_tokens": period, "rate": 0.05, "rule": rule},
            },
            {
                "period_tokens": 128,
                "expansion": 1.0,
                "in_context": {"period_tokens": 2 * period, "rate": 0.05, "rule": rule},
            },
        ],
        "in_context": {"lifetime": "stream", "meta_gradient": "first_order"},
    }


PARTS = {
    "hope": (_HOPE, {"kind": "cms", "levels": [{"period_tokens": 64, "expansion": 1.5}]}),
    "hope_linear": (_HOPE | {"depth": 1, "normalise": False}, _SWIGLU),
    "hope_in_context": (_HOPE, _levels(8, {"kind": "momentum", "inertia": 0.5})),
    "attention_in_context": ({"kind": "attention", "num_heads": 2}, _levels(4, {"kind": "adam"})),
    "titans_lmm": (_TITANS, _SWIGLU),
    "titans_mac": ({"kind": "titans_mac", "segment": 8} | _HYBRID, _SWIGLU),
    "titans_mag": ({"kind": "titans_mag", "window": 8} | _HYBRID, _SWIGLU),
    "titans_mal": ({"kind": "titans_mal", "window": 8} | _HYBRID, _SWIGLU),
    "transformer": ({"kind": "attention", "num_heads": 2}, _SWIGLU),
    "sliding_window": ({"kind": "attention", "num_heads": 2, "window": 8}, _SWIGLU),
    "linear_attention": ({"kind": "linear_attention", "num_heads": 2, "head_width": 6}, _SWIGLU),
    "delta_net": ({"kind": "delta_net", "num_heads": 2, "head_width": 6}, _SWIGLU),
    "gated_delta_net": (
        {"kind": "gated_delta_net", "num_heads": 2, "head_width": 6, "value_expansion": 2.0},
        _SWIGLU,
    ),
}


def build(name, dtype=torch.float64, seed=0, **changes):
    mixer, channel = PARTS[name]
    settings = {"vocab_size": 61, "width": 12, "num_layers": 2, "mixer": mixer, "channel": channel} | changes
    model = LanguageModel(ModelConfig.model_validate(settings))
    model.initialise(seed)
    with torch.no_grad():
        model.embedding.weight.mul_(20.0)  # predictions that depend strongly on what was read
    return model.to(dtype).eval()


@torch.no_grad()
def overflowing(name, *, layer):
    """A model with finite weights and one mixer whose outputs are beyond float32."""
    model = build(name, torch.float32)
    model.blocks[layer].mixer.output_gate.weight.mul_(1e30)
    model.blocks[layer].mixer.out.weight.mul_(1e30)
    return model


def identity_of(model, tokenizer="t" * 64):
    return identify(model, tokenizer_hash=tokenizer, label="a run, step 3")


def tokens(*shape, seed=0):
    return torch.randint(1, 61, shape, generator=torch.Generator().manual_seed(seed))


def documents(*lengths, seed=0):
    return [tokens(length, seed=seed + index).numpy() for index, length in enumerate(lengths)]


def document(rng, context, *ends):
    """Sequences that begin with the same tokens; their ends, of so many tokens, are scored."""
    text = rng.integers(1, 61, context)
    return tuple(Scored(np.concatenate([[0], text, rng.integers(1, 61, end)]), 1 + context) for end in ends)


def trees():
    """Documents that have much in common, in themselves and with one another."""
    rng = np.random.default_rng(4)
    sizes = [(5, 1, 1), (5, 1, 2, 7), (9, 3), (30, 4, 12), (5, 2, 2), (21, 1), (17, 6, 5, 4, 3)]
    made = [document(rng, *size) for size in sizes]
    # The sequences part before the scored tokens, as in WinoGrande, or only some tokens after their first.
    a, b = made[0]
    made.append((a, Scored(np.concatenate([a.tokens[:3], b.tokens[4:], [7, 8]]), b.first)))
    made.append((Scored(np.array([0, 5, 6, 7, 8]), 2), Scored(np.array([0, 5, 6, 7, 9, 9]), 2)))
    # Questions about one passage, answered by one token or two that begin alike.
    passage = rng.integers(1, 61, 24)
    questions = []
    for question in ([3, 4], [3, 9, 9], [5]):
        text = np.concatenate([[0], passage, question])
        ends = ([7], [8, 1], [8, 2])
        questions.append(tuple(Scored(np.concatenate([text, end]), len(text)) for end in ends))
    return questions + made


@torch.no_grad()
def alone(model, sequence, state=None):
    """Scores of a sequence by the plainest code: one call, one token after the other."""
    logits = model(torch.from_numpy(sequence.tokens[None, :-1]), state=state).logits[0].log_softmax(dim=-1)
    pairs = [(logits[at - 1], sequence.tokens[at]) for at in range(sequence.first, len(sequence.tokens))]
    nats = np.array([-float(row[token]) for row, token in pairs])
    return TokenScores(nats, np.array([1 + int((row > row[token]).sum()) for row, token in pairs]))


def assert_scores(found, expected, tolerance=1e-10):
    """Scores of documents are equal, up to rounding, token for token."""
    assert [len(row) for row in found] == [len(row) for row in expected]
    for one, wanted in zip(found, expected, strict=True):
        for a, b in zip(one, wanted, strict=True):
            np.testing.assert_allclose(a.nats, b.nats, rtol=0, atol=tolerance)
            np.testing.assert_array_equal(a.ranks, b.ranks)
