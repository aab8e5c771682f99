"""Clock B against the same thing written out, and the promises every model keeps while its levels are written."""

import pytest
import torch

from nested_lm.config.model import ModelConfig
from nested_lm.nn.model import LanguageModel, token_losses
from nested_lm.nn.state import iterate_tensors
from tests.nn.in_context_naive import plain_model, read_one

LIMIT = 1e-10  # relative, float64


def level(period, rate, **rule):
    return {"period_tokens": period, "rate": rate, "rule": {"kind": "gd"} | rule}


def settings(mixer="attention", *, wiring="sequential", lifetime="document", order="first_order", **changes):
    """Two layers; of three levels the middle one is not written in context."""
    mixers = {
        "attention": {"kind": "attention", "num_heads": 2},
        "self_modifying": {"kind": "self_modifying", "num_heads": 2, "head_width": 4, "chunk": 4},
    }
    levels = [
        {"period_tokens": 64, "expansion": 1.5, "in_context": level(4, 0.3)},
        {"period_tokens": 128, "expansion": 1.0},
        {"period_tokens": 256, "expansion": 2.0, "in_context": level(8, 0.2)},
    ]
    return {
        "vocab_size": 23,
        "width": 8,
        "num_layers": 2,
        "mixer": mixers[mixer],
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
                {"period_tokens": 64, "in_context": level(4, 0.3)},
                {"period_tokens": 128, "in_context": level(12, 0.2)},
            ],
            "in_context": {"lifetime": "document", "meta_gradient": "first_order"},
        },
    }


VARIANTS = {
    "attention": settings(),
    "hope": settings("self_modifying"),
    "nested": settings(wiring="nested"),
    "independent": settings(wiring="independent"),
    "layer_levels": layer_levels(),
    "untied": settings(tie_embeddings=False),
}
every_variant = pytest.mark.parametrize("given", VARIANTS.values(), ids=VARIANTS.keys())


def build(given, dtype=torch.float64, seed=0, **kwargs):
    model = LanguageModel(ModelConfig.model_validate(given), **kwargs).to(dtype)
    model.initialise(seed)
    return model


def tokens(*shape, seed=0):
    return torch.randint(0, 23, shape, generator=torch.Generator().manual_seed(seed))


def relative(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def naive(model, given, ids, **kwargs):
    plain = plain_model(given, model.state_dict())
    parameters = dict(model.named_parameters())
    return torch.stack([read_one(plain, parameters, given, row, **kwargs) for row in ids])


@every_variant
class TestEveryVariant:
    def test_it_equals_whole_copies_of_the_weights_a_row(self, given):
        model, ids = build(given), tokens(2, 27)
        found = model(ids).logits
        assert relative(found, naive(model, given, ids)) < LIMIT
        assert relative(found, plain_model(given, model.state_dict())(ids).logits) > 1e-2  # the writes matter

    def test_first_order_gradients_equal_those_of_the_copies(self, given):
        model, ids = build(given), tokens(2, 27)
        gradients = []
        for logits in (model(ids[:, :-1]).logits, naive(model, given, ids[:, :-1])):
            loss = token_losses(logits, ids[:, 1:]).mean()
            gradients.append(torch.autograd.grad(loss, list(model.parameters())))
        assert all(relative(a, b) < LIMIT for a, b in zip(*gradients, strict=True))

    @pytest.mark.parametrize("recompute", ["chunk", "block"])
    def test_recomputation_gives_the_same_gradients(self, given, recompute):
        ids, gradients = tokens(2, 18), []
        for kind in ("none", recompute):
            model = build(given, recompute=kind)
            token_losses(model(ids[:, :-1]).logits, ids[:, 1:]).mean().backward()
            gradients.append([parameter.grad for parameter in model.parameters()])
        assert all(relative(a, b) < LIMIT for a, b in zip(*gradients, strict=True))

    @pytest.mark.parametrize("cut", [1, 3, 4, 5, 8, 9, 15, 16, 26])
    def test_a_stream_cut_anywhere_equals_one_pass(self, given, cut):
        model, ids = build(given), tokens(2, 27)
        with torch.no_grad():
            whole = model(ids)
            first = model(ids[:, :cut])
            second = model(ids[:, cut:], state=first.state)
        assert relative(torch.cat([first.logits, second.logits], dim=1), whole.logits) < LIMIT
        for a, b in zip(_tensors(second.state), _tensors(whole.state), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)

    def test_token_by_token_equals_one_pass(self, given):
        model, ids = build(given), tokens(2, 19)
        state, logits = None, []
        with torch.no_grad():
            for t in range(19):
                out = model(ids[:, t : t + 1], state=state)
                state = out.state
                logits.append(out.logits)
            assert relative(torch.cat(logits, dim=1), model(ids).logits) < LIMIT

    def test_gradients_of_a_cut_stream_are_those_of_one_pass(self, given):
        model, ids = build(given), tokens(2, 20)
        gradients = []
        for cuts in ([], [3, 9], [4, 16]):
            state, logits = None, []
            for begin, end in zip([0, *cuts], [*cuts, 19], strict=True):
                out = model(ids[:, begin:end], state=state)
                state = out.state
                logits.append(out.logits)
            loss = token_losses(torch.cat(logits, dim=1), ids[:, 1:]).mean()
            gradients.append(torch.autograd.grad(loss, list(model.parameters())))
        for found in gradients[1:]:
            assert all(relative(a, b) < LIMIT for a, b in zip(found, gradients[0], strict=True))

    def test_evaluation_writes_as_training_does(self, given):
        model, ids = build(given), tokens(2, 21)
        trained = model(ids)
        with torch.no_grad():
            scored = model(ids)
        assert relative(scored.logits, trained.logits) < LIMIT
        assert not any(tensor.requires_grad for tensor in _tensors(scored.state))

    @pytest.mark.parametrize("changed_token", [0, 7, 8, 9, 13])
    def test_future_tokens_do_not_change_past_logits(self, given, changed_token):
        model, ids = build(given), tokens(1, 21)
        changed = ids.clone()
        changed[0, changed_token] = (changed[0, changed_token] + 1) % 23
        with torch.no_grad():
            before, after = model(ids).logits, model(changed).logits
        if changed_token:
            assert relative(after[:, :changed_token], before[:, :changed_token]) < 1e-13
        assert not torch.allclose(after[:, changed_token:], before[:, changed_token:])

    def test_rows_do_not_see_each_other(self, given):
        model, ids = build(given), tokens(3, 17)
        with torch.no_grad():
            assert relative(model(ids).logits[1:2], model(ids[1:2]).logits) < LIMIT

    def test_packed_documents_are_read_as_if_alone(self, given):
        model, ids = build(given), tokens(2, 28)
        resets = torch.zeros(2, 28, dtype=torch.bool)
        resets[:, 0] = resets[0, 12] = resets[1, 4] = resets[1, 16] = True
        with torch.no_grad():
            packed = model(ids, resets=resets).logits
            for row, begin, end in ((0, 0, 12), (0, 12, 28), (1, 0, 4), (1, 4, 16), (1, 16, 28)):
                alone = model(ids[row : row + 1, begin:end]).logits[0]
                assert relative(packed[row, begin:end], alone) < LIMIT

    @pytest.mark.parametrize("cut", [3, 12, 13, 16, 22])
    def test_a_packed_stream_can_be_cut(self, given, cut):
        model, ids = build(given), tokens(2, 28)
        resets = torch.zeros(2, 28, dtype=torch.bool)
        resets[:, 0] = resets[0, 12] = resets[1, 4] = resets[1, 16] = True
        with torch.no_grad():
            whole = model(ids, resets=resets).logits
            first = model(ids[:, :cut], resets=resets[:, :cut])
            second = model(ids[:, cut:], resets=resets[:, cut:], state=first.state)
        assert relative(torch.cat([first.logits, second.logits], dim=1), whole) < LIMIT

    def test_a_lent_state_is_not_changed_and_forks_go_on_alike(self, given):
        model, ids = build(given), tokens(2, 18)
        with torch.no_grad():
            state = model(ids[:, :10]).state
            before = [tensor.clone() for tensor in _tensors(state)]
            expected = model(ids[:, 10:], state=state).logits
            forked = model(ids[[1, 1, 0], 10:], state=state.select(torch.tensor([1, 1, 0]))).logits
        assert all(torch.equal(a, b) for a, b in zip(_tensors(state), before, strict=True))
        assert relative(forked, expected[[1, 1, 0]]) < LIMIT


def _tensors(state):
    return iterate_tensors((state.layers, state.in_context))
