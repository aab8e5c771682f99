"""Clock B against the same thing written out, and the promises every model keeps while its levels are written."""

import pytest
import torch

from nested_lm.nn.model import token_losses
from nested_lm.nn.state import iterate_tensors
from tests.nn.in_context_models import build, layer_levels, relative, settings, tokens
from tests.nn.in_context_naive import plain_model, read_rows

LIMIT = 1e-10  # relative, float64

VARIANTS = {
    "attention": settings(),
    "hope": settings("self_modifying"),
    "nested": settings(wiring="nested"),
    "independent": settings(wiring="independent"),
    "layer_levels": layer_levels(),
    "a rule each": settings("self_modifying", rule=({"kind": "gd"}, {"kind": "momentum", "inertia": 0.8})),
    "nested, a rule each": settings(wiring="nested", rule=({"kind": "momentum", "inertia": 0.8}, {"kind": "gd"})),
}


def tensors(state):
    return iterate_tensors((state.layers, state.in_context))


def gradients(model, logits, ids):
    return torch.autograd.grad(token_losses(logits, ids[:, 1:]).mean(), list(model.parameters()))


def packing():
    """Tokens of two rows with documents of 12 + 16 and of 4 + 12 + 12, and where they start."""
    resets = torch.zeros(2, 28, dtype=torch.bool)
    resets[:, 0] = resets[0, 12] = resets[1, 4] = resets[1, 16] = True
    return tokens(2, 28), resets


@pytest.mark.parametrize("given", VARIANTS.values(), ids=VARIANTS.keys())
class TestEveryVariant:
    def test_it_equals_whole_copies_of_the_weights_a_row(self, given):
        model, ids = build(given), tokens(2, 27)
        found = model(ids[:, :-1]).logits
        expected = read_rows(model, given, ids[:, :-1])
        assert relative(found, expected) < LIMIT
        plain = plain_model(given, model.state_dict())(ids[:, :-1]).logits
        assert relative(found, plain) > 1e-2  # the writes matter
        # First-order gradients of training: each write is a constant.
        for a, b in zip(gradients(model, found, ids), gradients(model, expected, ids), strict=True):
            assert relative(a, b) < LIMIT

    def test_a_stream_cut_anywhere_equals_one_pass(self, given):
        model, ids = build(given), tokens(2, 27)
        with torch.no_grad():
            whole = model(ids)
            for cut in (1, 4, 9, 16, 26):
                first = model(ids[:, :cut])
                second = model(ids[:, cut:], state=first.state)
                assert relative(torch.cat([first.logits, second.logits], dim=1), whole.logits) < LIMIT
                for a, b in zip(tensors(second.state), tensors(whole.state), strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)

    def test_token_by_token_equals_one_pass_and_training_equals_evaluation(self, given):
        model, ids = build(given), tokens(2, 18)
        trained = model(ids).logits
        state, logits = None, []
        with torch.no_grad():
            for t in range(18):
                out = model(ids[:, t : t + 1], state=state)
                state = out.state
                logits.append(out.logits)
        assert relative(torch.cat(logits, dim=1), trained) < LIMIT
        assert not any(tensor.requires_grad for tensor in tensors(state))

    def test_gradients_of_a_cut_stream_are_those_of_one_pass(self, given):
        model, ids = build(given), tokens(2, 20)
        whole = gradients(model, model(ids[:, :-1]).logits, ids)
        first = model(ids[:, :9])
        second = model(ids[:, 9:16], state=first.state)
        third = model(ids[:, 16:-1], state=second.state)
        cut = gradients(model, torch.cat([first.logits, second.logits, third.logits], dim=1), ids)
        assert all(relative(a, b) < LIMIT for a, b in zip(cut, whole, strict=True))

    def test_recomputation_gives_the_same_gradients(self, given):
        ids, found = tokens(2, 14), []
        for kind in ("none", "block"):
            model = build(given, recompute=kind)
            found.append(gradients(model, model(ids[:, :-1]).logits, ids))
        assert all(relative(a, b) < LIMIT for a, b in zip(*found, strict=True))

    def test_future_tokens_do_not_change_past_logits(self, given):
        model, ids = build(given), tokens(1, 17)
        changes = [7, 8, 9]  # before, at and after a border: one row each
        changed = ids.repeat(3, 1)
        for row, at in enumerate(changes):
            changed[row, at] = (changed[row, at] + 1) % 23
        with torch.no_grad():
            before, after = model(ids).logits[0], model(changed).logits
        for row, at in enumerate(changes):
            assert relative(after[row, :at], before[:at]) < 1e-13
            assert not torch.allclose(after[row, at:], before[at:])

    def test_rows_do_not_see_each_other(self, given):
        model, ids = build(given), tokens(3, 17)
        with torch.no_grad():
            assert relative(model(ids).logits[1:2], model(ids[1:2]).logits) < LIMIT

    def test_packed_documents_are_read_as_if_alone(self, given):
        model, (ids, resets) = build(given), packing()
        with torch.no_grad():
            packed = model(ids, resets=resets).logits
            for row, begin, end in ((0, 0, 12), (0, 12, 28), (1, 0, 4), (1, 4, 16), (1, 16, 28)):
                alone = model(ids[row : row + 1, begin:end]).logits[0]
                assert relative(packed[row, begin:end], alone) < LIMIT

    def test_a_packed_stream_can_be_cut(self, given):
        model, (ids, resets) = build(given), packing()
        with torch.no_grad():
            whole = model(ids, resets=resets).logits
            for cut in (3, 12, 13, 16):
                first = model(ids[:, :cut], resets=resets[:, :cut])
                second = model(ids[:, cut:], resets=resets[:, cut:], state=first.state)
                assert relative(torch.cat([first.logits, second.logits], dim=1), whole) < LIMIT

    def test_a_lent_state_is_not_changed_and_forks_go_on_alike(self, given):
        model, ids = build(given), tokens(2, 18)
        with torch.no_grad():
            state = model(ids[:, :10]).state
            before = [tensor.clone() for tensor in tensors(state)]
            expected = model(ids[:, 10:], state=state).logits
            forked = model(ids[[1, 1, 0], 10:], state=state.select(torch.tensor([1, 1, 0]))).logits
        assert all(torch.equal(a, b) for a, b in zip(tensors(state), before, strict=True))
        assert relative(forked, expected[[1, 1, 0]]) < LIMIT


def test_momentum_equals_whole_copies_of_the_weights():
    given = settings(rule={"kind": "momentum", "inertia": 0.8})
    model, ids = build(given), tokens(2, 27)
    with torch.no_grad():
        assert relative(model(ids).logits, read_rows(model, given, ids)) < LIMIT


def test_recomputed_chunks_give_the_same_gradients():
    ids, found = tokens(2, 14), []
    for kind in ("none", "chunk"):
        model = build(settings("self_modifying"), recompute=kind)
        found.append(gradients(model, model(ids[:, :-1]).logits, ids))
    assert all(relative(a, b) < LIMIT for a, b in zip(*found, strict=True))
