"""Clock B in detail: which tokens a level learns from and when, inner optimizers, second order, lifetimes, refusals."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import one_hot

from nested_lm.config.channels import ContinuumMemory
from nested_lm.config.update_rules import UpdateRule
from nested_lm.nn.channels.in_context import InContextWriter
from nested_lm.nn.fast_linear import FastLinear, MLPDistance
from nested_lm.nn.model import token_losses
from nested_lm.nn.state import ModelOutput, StreamState, iterate_tensors
from nested_lm.ops.update_rules.registry import RULES
from tests.nn.in_context_models import build, finite_difference, relative, settings, tokens, writes
from tests.nn.in_context_naive import plain_model, read_rows

LIMIT = 1e-10  # relative, float64


class Columns(torch.nn.Module):
    """A level of a toy model that answers token j with column j of its fast copy."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def initial_distance(self, batch_size):
        return MLPDistance(*torch.zeros(2, batch_size, self.size, self.size, dtype=torch.float64))


def toy(periods, size, *, lifetime="document", wiring="sequential"):
    """A writer over levels of rate 1, and its model: logits are the sum of the levels' columns of the token."""
    channel = ContinuumMemory.model_validate(
        {
            "kind": "cms",
            "wiring": wiring,
            "levels": [
                {"period_tokens": 64 * 2**i, "expansion": 1.0, "in_context": writes(p, 1.0)}
                for i, p in enumerate(periods)
            ],
            "in_context": {"lifetime": lifetime, "meta_gradient": "first_order"},
        }
    )
    writer = InContextWriter(channel, [{level: Columns(size) for level in range(len(periods))}])

    def predict(ids, resets, state, fast):
        table = sum(distance.inner + 0 * distance.outer for distance in fast[0].values())
        logits = one_hot(ids, size).double() @ table.transpose(1, 2)
        packed = state.packed or (resets is not None and bool(resets.any()))
        return ModelOutput(logits, replace(state, position=state.position + ids.shape[1], packed=packed), {})

    def read(ids, resets=None, state=None):
        if state is None:
            state = StreamState((), 0, False, None, writer.initial_state(len(ids), (), torch.device("cpu")))
        return writer.read(predict, ids, resets, state)

    return read


def learned(size, pairs):
    """What a level holds that has learned token -> target from zero with rate 1: (V, V)."""
    table = torch.zeros(size, size, dtype=torch.float64)
    for token, target in pairs:
        table[:, token] += one_hot(torch.tensor(target), size) - 1 / size
    return table


class TestPositionsAsValues:
    """Token j is position j, so a level's column j shows whether, and with which target, it learned from position j."""

    PERIODS = (2, 6, 12)

    def test_each_level_learns_from_exactly_its_own_tokens(self):
        ids = torch.arange(31)[None]
        for end in range(1, 32):
            state = toy(self.PERIODS, 32)(ids[:, :end]).state
            for level, period in zip(state.in_context.levels, self.PERIODS, strict=True):
                border = (end - 1) // period * period  # a period is written when the token after it is there
                expected = learned(32, [(token, token + 1) for token in range(border)])
                torch.testing.assert_close(level.distance[0].inner[0], expected)

    def test_it_does_so_token_by_token_as_well(self):
        read, state = toy(self.PERIODS, 32), None
        for token in range(31):
            state = read(torch.tensor([[token]]), state=state).state
        for level, border in zip(state.in_context.levels, (30, 30, 24), strict=True):
            expected = learned(32, [(token, token + 1) for token in range(border)])
            torch.testing.assert_close(level.distance[0].inner[0], expected)

    def test_a_border_whose_write_is_done_counts_the_period_before_it(self):
        ids, read = torch.arange(31)[None], toy(self.PERIODS, 32)
        for border in (2, 4, 6, 8, 12):
            state = read(ids[:, :border]).state
            written = read(ids[:, border : border + 1], state=state).state.in_context
            done = replace(state, in_context=written._replace(border=(), window=written.window[:, :0]))
            for cut in range(border + 1, 31):
                first = read(ids[:, border:cut], state=done).state
                levels = read(ids[:, cut:], state=first).state.in_context.levels
                for level, last in zip(levels, (30, 30, 24), strict=True):
                    expected = learned(32, [(token, token + 1) for token in range(last)])
                    torch.testing.assert_close(level.distance[0].inner[0], expected)

    def test_a_prediction_across_a_document_start_does_not_count(self):
        ids, resets = torch.arange(31)[None], torch.zeros(1, 31, dtype=torch.bool)
        resets[0, 8] = True
        state = toy(self.PERIODS, 32, lifetime="stream")(ids, resets).state
        for level, border in zip(state.in_context.levels, (30, 30, 24), strict=True):
            expected = learned(32, [(token, token + 1) for token in range(border) if token != 7])
            torch.testing.assert_close(level.distance[0].inner[0], expected)

    def test_a_document_counts_its_periods_from_its_own_start(self):
        ids, resets = torch.arange(31).repeat(2, 1), torch.zeros(2, 31, dtype=torch.bool)
        resets[0, 8] = True
        state = toy(self.PERIODS, 32)(ids, resets).state
        for level, borders in zip(state.in_context.levels, ((30, 30), (26, 30), (20, 24)), strict=True):
            for row, (begin, end) in enumerate(zip((8, 0), borders, strict=True)):
                expected = learned(32, [(token, token + 1) for token in range(begin, end)])
                torch.testing.assert_close(level.distance[0].inner[row], expected)

    def test_a_nested_level_starts_again_when_the_slower_one_writes(self):
        ids = torch.arange(31)[None]
        for end in (6, 7, 9, 12, 13, 25, 27):
            state = toy(self.PERIODS, 32, wiring="nested")(ids[:, :end]).state
            fast, middle, slow = (level.distance[0].inner[0] for level in state.in_context.levels)
            borders = [(end - 1) // period * period for period in self.PERIODS]
            for found, first, last in (
                (fast, borders[1], borders[0]),
                (middle, borders[2], borders[1]),
                (slow, 0, borders[2]),
            ):
                torch.testing.assert_close(found, learned(32, [(t, t + 1) for t in range(first, last)]))


def test_a_level_moves_at_its_own_borders_only():
    model, ids = build(settings()), tokens(1, 26)
    state, moved = None, {4: [], 8: []}
    with torch.no_grad():
        for position in range(26):
            before = state
            state = model(ids[:, position : position + 1], state=state).state
            if before is not None:
                for index, period in enumerate(moved):
                    old, new = (s.in_context.levels[index].distance for s in (before, state))
                    if any(not torch.equal(a, b) for a, b in zip(*map(iterate_tensors, (old, new)), strict=True)):
                        moved[period].append(position)
    assert moved == {4: [4, 8, 12, 16, 20, 24], 8: [8, 16, 24]}


@pytest.mark.parametrize("kind", RULES)
def test_every_inner_optimizer_streams_packs_and_matters(kind):
    model, ids = build(settings(rule={"kind": kind}, rates=(0.03, 0.02), num_layers=1)), tokens(2, 27)
    resets = torch.zeros(2, 27, dtype=torch.bool)
    resets[0, 12] = resets[1, 4] = True
    with torch.no_grad():
        whole = model(ids, resets=resets).logits
        for cut in (5, 12, 16):
            first = model(ids[:, :cut], resets=resets[:, :cut])
            second = model(ids[:, cut:], resets=resets[:, cut:], state=first.state)
            assert relative(torch.cat([first.logits, second.logits], dim=1), whole) < LIMIT
        assert relative(whole[0, 12:], model(ids[:1, 12:]).logits[0]) < LIMIT
        assert relative(whole[1, 4:], model(ids[1:, 4:]).logits[0]) < LIMIT
    assert (
        relative(whole[0, :12], plain_model(model_settings(model), model.state_dict())(ids[:1, :12]).logits[0]) > 1e-4
    )


def model_settings(model):
    return model.config.model_dump(mode="json")


def test_presets_can_choose_every_inner_optimizer():
    sections = {section.model_fields["kind"].annotation.__args__[0] for section in UpdateRule.__args__[0].__args__}
    assert sections == set(RULES)


class TestSecondOrder:
    """Training differentiates the writes too."""

    @pytest.mark.parametrize("recompute", ["none", "block"])
    @pytest.mark.parametrize("wiring", ["sequential", "nested", "independent"])
    def test_the_gradient_is_that_of_the_loss(self, wiring, recompute):
        given = settings(wiring=wiring, order="second_order", rates=(0.01, 0.01))
        resets = torch.zeros(2, 20, dtype=torch.bool)
        resets[1, 12] = True
        found, expected = finite_difference(build(given, recompute=recompute), tokens(2, 21), resets)
        assert found == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize("kind", RULES)
    def test_it_passes_through_every_inner_optimizer(self, kind):
        given = settings(order="second_order", rule={"kind": kind}, rates=(0.03, 0.02), num_layers=1)
        found, expected = finite_difference(build(given), tokens(2, 18), None)
        assert found == pytest.approx(expected, rel=1e-4)

    def test_with_one_layer_the_memories_of_hope_are_below_the_writes(self):
        given = settings("self_modifying", order="second_order", rates=(0.05, 0.04), num_layers=1)
        found, expected = finite_difference(build(given), tokens(2, 18), None)
        assert found == pytest.approx(expected, rel=1e-5)

    def test_it_equals_whole_copies_of_the_weights_whatever_the_cuts(self):
        given = settings(order="second_order")
        model, ids = build(given), tokens(2, 19)
        first = model(ids[:, :7])
        second = model(ids[:, 7:-1], state=first.state)
        with sdpa_kernel(SDPBackend.MATH):
            naive = read_rows(model, given, ids[:, :-1], second_order=True)
        found = []
        for logits in (torch.cat([first.logits, second.logits], dim=1), model(ids[:, :-1]).logits, naive):
            loss = token_losses(logits, ids[:, 1:]).mean()
            found.append(torch.autograd.grad(loss, list(model.parameters())))
        for others in found[:2]:
            assert all(relative(a, b) < LIMIT for a, b in zip(others, found[2], strict=True))

    def test_first_order_is_another_gradient_and_keeps_no_graph(self):
        model, ids = build(settings()), tokens(2, 21)
        found, expected = finite_difference(model, ids, None)
        assert abs(found - expected) > 1e-3 * abs(expected)
        state = model(ids).state
        assert not any(t.requires_grad for t in iterate_tensors(state.in_context.levels))
        second = build(settings(order="second_order"))(ids).state
        assert any(t.requires_grad for t in iterate_tensors(second.in_context.levels))


class TestLifetime:
    def test_carried_copies_go_on_over_a_document_start(self):
        given = settings("self_modifying", lifetime="stream")
        model, ids = build(given), tokens(2, 27)
        resets = torch.zeros(2, 27, dtype=torch.bool)
        resets[:, 12] = True
        with torch.no_grad():
            found = model(ids, resets=resets).logits
            assert relative(found, read_rows(model, given, ids, starts={12})) < LIMIT
            fresh = build(settings("self_modifying"))(ids, resets=resets).logits
        assert relative(found[:, :12], fresh[:, :12]) < LIMIT
        assert relative(found[:, 12:], fresh[:, 12:]) > 1e-2

    def test_what_is_carried_survives_a_cut(self):
        model, ids = build(settings(lifetime="stream")), tokens(2, 27)
        resets = torch.zeros(2, 27, dtype=torch.bool)
        resets[0, 12] = resets[1, 16] = True
        with torch.no_grad():
            whole = model(ids, resets=resets).logits
            for cut in (11, 12, 13, 18):
                first = model(ids[:, :cut], resets=resets[:, :cut])
                second = model(ids[:, cut:], resets=resets[:, cut:], state=first.state)
                assert relative(torch.cat([first.logits, second.logits], dim=1), whole) < LIMIT


class TestRateZero:
    def test_without_a_rate_the_model_is_the_plain_one(self):
        given = settings(rates=(0.0, 0.0))
        model, ids = build(given), tokens(2, 21)
        assert model.initial_state(2).in_context is None
        assert torch.equal(model(ids).logits, plain_model(given, model.state_dict())(ids).logits)

    @pytest.mark.parametrize("mixer", ["attention", "self_modifying"])
    def test_writes_of_next_to_nothing_leave_the_plain_logits(self, mixer):
        given = settings(mixer, rates=(1e-30, 0.0))
        model, ids = build(given), tokens(2, 21)
        assert relative(model(ids).logits, plain_model(given, model.state_dict())(ids).logits) < 1e-12

    def test_the_outer_gradient_is_then_that_of_the_plain_model(self):
        given = settings(rates=(1e-30, 1e-30))
        model, ids = build(given), tokens(2, 21)
        plain = plain_model(given, model.state_dict())
        for one in (model, plain):
            token_losses(one(ids[:, :-1]).logits, ids[:, 1:]).mean().backward()
        for a, b in zip(model.parameters(), plain.parameters(), strict=True):
            assert relative(a.grad, b.grad) < LIMIT


class TestState:
    def test_it_has_constant_size_and_counts_the_fast_copies(self):
        model = build(settings("self_modifying"))
        plain = plain_model(model_settings(model), model.state_dict())
        sizes = [model(tokens(2, count)).state.num_bytes() for count in (9, 81)]
        assert sizes[0] == sizes[1]
        written = 2 * 2 * 8 * (2 * 12 + 2 * 16) * 8  # rows, layers, width, both matrices of both levels, float64
        assert sizes[0] - plain(tokens(2, 9)).state.num_bytes() > written

    def test_detaching_cuts_the_graph(self):
        state = build(settings(order="second_order"))(tokens(2, 10)).state.detach()
        assert not any(t.requires_grad for t in iterate_tensors((state.layers, state.in_context)))

    def test_under_bfloat16_autocast_the_copies_stay_in_float32(self):
        given = settings("self_modifying", rates=(0.02, 0.02), init_std=0.02)
        given["mixer"] = given["mixer"] | {"rates": {"memory": 0.5}}  # rates near 1 and beyond do not forget errors
        model, ids = build(given, dtype=torch.float32), tokens(2, 27)
        expected = model(ids[:, :-1])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(ids[:, :-1])
            token_losses(out.logits, ids[:, 1:]).mean().backward()
            with torch.no_grad():
                scored = model(ids[:, :-1])
        assert {t.dtype for t in iterate_tensors(out.state.in_context.levels)} == {torch.float32}
        # bfloat16 keeps 8 bits: 0.4 % a product, over some ten products in a row
        assert (out.logits.float() - expected.logits).norm() / expected.logits.norm() < 3e-2
        assert (scored.logits.float() - expected.logits).norm() / expected.logits.norm() < 3e-2
        for found, wanted in zip(*(iterate_tensors(o.state.in_context.levels) for o in (out, expected)), strict=True):
            assert (found - wanted).norm() <= 0.1 * wanted.norm()

    def test_statistics_say_how_far_each_level_went(self):
        out = build(settings("self_modifying"))(tokens(2, 13))
        assert {"in_context/level0", "in_context/level2", "layer0/rate"} <= set(out.stats)
        assert all(value.ndim == 0 and not value.requires_grad for value in out.stats.values())
        squares = sum(t.square().sum((1, 2)) for t in iterate_tensors(out.state.in_context.levels[0].distance))
        assert out.stats["in_context/level0"].item() == pytest.approx(squares.sqrt().mean().item(), rel=1e-6)


def test_training_leaves_no_gradient_on_the_copies():
    """They are leaves of the outer graph; gradients there would be memory spent on nothing."""
    model, ids, leaves = build(settings()), tokens(2, 21), []
    before = torch.Tensor.requires_grad_

    def remember(self, flag=True):
        if flag:
            leaves.append(self)
        return before(self, flag)

    torch.Tensor.requires_grad_ = remember
    try:
        token_losses(model(ids[:, :-1]).logits, ids[:, 1:]).mean().backward()
    finally:
        torch.Tensor.requires_grad_ = before
    assert len(leaves) == 4 * 2 * 4  # segments whose last target came, layers, matrices of the two levels
    assert all(leaf.grad is None for leaf in leaves)


def test_a_fast_linear_is_the_layer_of_the_moved_weights():
    layer = FastLinear(3, 4).double()
    x, distance = torch.randn(2, 5, 3, dtype=torch.float64), torch.randn(2, 4, 3, dtype=torch.float64)
    for row in range(2):
        expected = x[row] @ (layer.weight + distance[row]).T
        torch.testing.assert_close(layer(x, distance)[row], expected)
    assert torch.equal(layer(x, layer.initial_distance(2)), layer(x))
    assert FastLinear(3, 4).bfloat16().initial_distance(2).dtype == torch.float32


class TestRefusals:
    def test_a_document_start_inside_a_segment(self):
        resets = torch.zeros(2, 20, dtype=torch.bool)
        resets[1, 6] = True
        with pytest.raises(ValueError, match=r"row 1 starts a document at token 6 .* inside a chunk of 4 tokens"):
            build(settings())(tokens(2, 20), resets=resets)

    def test_the_state_of_a_model_without_fast_copies(self):
        model, ids = build(settings()), tokens(1, 5)
        state = plain_model(model_settings(model), model.state_dict())(ids).state
        with pytest.raises(ValueError, match=r"channel.levels\[0\].in_context"):
            model(ids, state=state)

    def test_inference_mode(self):
        with torch.inference_mode(), pytest.raises(RuntimeError, match=r"use torch.no_grad"):
            build(settings())(tokens(1, 5))
