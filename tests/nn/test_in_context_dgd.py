"""Delta Gradient Descent as inner optimizer of a level: the argmin of eq. 56 for each sequence, of what it read."""

import re
from functools import partial

import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from nested_lm.config.model import ModelConfig
from nested_lm.nn.fast_linear import FastLinear, Watched
from nested_lm.nn.model import token_losses
from nested_lm.nn.state import iterate_tensors
from nested_lm.reading.tree import flatten, rebuild
from tests.nn.in_context_models import build, finite_difference, layer_levels, relative, settings, tokens
from tests.nn.in_context_naive import level_names, plain_model

LIMIT = 1e-10  # relative, float64

ERASE = ["written", "whole"]


def given(erase="written", *, rates=(0.3, 0.2), **changes):
    return settings(rule={"kind": "dgd", "erase": erase}, rates=rates, **changes)


def argmin(weights, inputs, output_gradients, rate):
    """Solve eq. 56 as a least-squares problem of stacked rows: no formula of the library."""
    identity = torch.eye(weights.shape[1], dtype=torch.float64) / rate**0.5
    stacked = torch.cat([inputs, identity]), torch.cat([-output_gradients, weights.T / rate**0.5])
    return torch.linalg.lstsq(*stacked, driver="gelsd").solution.T


def remember(found, name, _layer, inputs, output):
    found[name] = inputs[0], output


@torch.enable_grad()
def read_by_argmin(model, document, ids):
    """Logits (T, V) of one sequence with whole copies of the weights, each write a least-squares problem."""
    plain = plain_model(document, model.state_dict())
    learned = {name: parameter.detach() for name, parameter in plain.named_parameters()}
    writes = {i: level["in_context"] for i, level in enumerate(document["channel"]["levels"]) if "in_context" in level}
    period = min(entry["period_tokens"] for entry in writes.values())
    names = level_names(model, document)
    copies = {name: learned[name] for level in writes for name in names[level]}
    rows = {name: [] for name in copies}
    state, logits = None, []
    for begin in range(0, len(ids), period):
        found, hooks = {}, []
        for name in copies:
            layer = plain.get_submodule(name.removesuffix(".weight"))
            hooks.append(layer.register_forward_hook(partial(remember, found, name)))
        part = ids[begin : begin + period]
        needing = {name: copy.clone().requires_grad_() for name, copy in copies.items()}
        out = functional_call(plain, learned | needing, (part[None],), {"state": state})
        for hook in hooks:
            hook.remove()
        logits.append(out.logits[0].detach())
        state = out.state.detach()
        targets = ids[begin + 1 : begin + period + 1]
        if len(targets) < period:
            break
        loss = cross_entropy(out.logits[0], targets, reduction="sum")
        slopes = torch.autograd.grad(loss, [output for _, output in found.values()])
        for (name, (inputs, _)), slope in zip(found.items(), slopes, strict=True):
            rows[name].append((inputs[0].detach(), slope[0]))
        for level, entry in writes.items():
            if (begin + period) % entry["period_tokens"] == 0:
                for name in names[level]:
                    inputs, slope = (torch.cat(parts) for parts in zip(*rows[name], strict=True))
                    kept = 0 if entry["rule"]["erase"] == "whole" else learned[name]
                    copies[name] = kept + argmin(copies[name] - kept, inputs, slope, entry["rate"])
                    rows[name] = []
    return torch.cat(logits)


class TestAgainstTheArgmin:
    @pytest.mark.parametrize("erase", ERASE)
    @pytest.mark.parametrize("mixer", ["attention", "self_modifying"])
    def test_levels_of_a_chain(self, mixer, erase):
        """Periods 4 and 8: the slower level collects the rows of two segments."""
        document = given(erase, mixer=mixer)
        model, ids = build(document), tokens(2, 26)
        with torch.no_grad():
            found = model(ids).logits
        for row in range(2):
            assert relative(found[row], read_by_argmin(model, document, ids[row])) < LIMIT

    def test_gated_mlps_of_layers(self):
        document = layer_levels()
        for level in document["channel"]["levels"]:
            level["in_context"]["rule"] = {"kind": "dgd", "erase": "written"}
        model, ids = build(document), tokens(1, 26)
        with torch.no_grad():
            assert relative(model(ids).logits[0], read_by_argmin(model, document, ids[0])) < LIMIT

    def test_it_is_another_step_than_that_of_the_gradient(self):
        ids = tokens(1, 26)
        with torch.no_grad():
            found = [build(document)(ids).logits for document in (given(), given("whole"), settings())]
        for one, other in ((0, 1), (0, 2), (1, 2)):
            assert relative(found[one][:, 4:], found[other][:, 4:]) > 1e-2


def test_the_output_at_a_token_depends_on_no_later_one():
    model, ids = build(given()), tokens(1, 26)
    with torch.no_grad():
        whole = model(ids).logits
        for token in range(26):
            changed = ids.clone()
            changed[:, token] = (changed[:, token] + 1) % 23
            assert torch.equal(model(changed).logits[:, :token], whole[:, :token])


@pytest.mark.parametrize("mixer", ["attention", "self_modifying"])
def test_sequences_share_nothing(mixer):
    """Outputs, and what waits to be written: moments of one row only."""
    model, ids = build(given(mixer=mixer)), tokens(3, 23)
    with torch.no_grad():
        together = model(ids)
        for row in range(3):
            alone = model(ids[row : row + 1])
            assert relative(together.logits[row], alone.logits[0]) < LIMIT
            pairs = zip(*(iterate_tensors(o.state.in_context.levels) for o in (together, alone)), strict=True)
            assert all(relative(a[row], b[0]) < LIMIT for a, b in pairs if b.any())


class TestWaitingRows:
    """The slower level keeps X^T X between segments, in the state."""

    def test_they_are_the_second_moments_of_its_inputs(self):
        model, ids = build(given()), tokens(2, 13)
        seen = []
        hook = model.blocks[1].channel.levels[2].inner.register_forward_hook(lambda _, x, y: seen.append(x[0].detach()))
        with torch.no_grad():
            state = model(ids).state
        hook.remove()
        pending = state.in_context.levels[1].pending[1].inner  # of tokens 8 to 11, of which 12 is the last target
        assert isinstance(pending, Watched)
        inputs = torch.cat(seen, dim=1)[:, 8:12]
        assert relative(pending.moment, inputs.mT @ inputs) < LIMIT

    def test_a_document_start_forgets_them(self):
        model, ids = build(given()), tokens(2, 21)
        resets = torch.zeros(2, 21, dtype=torch.bool)
        resets[0, 4] = True  # one segment waits
        with torch.no_grad():
            assert relative(model(ids, resets=resets).logits[0, 4:], model(ids[:1, 4:]).logits[0]) < LIMIT

    def test_they_survive_a_file_and_a_choice_of_rows(self):
        model, ids = build(given()), tokens(2, 21)
        with torch.no_grad():
            whole = model(ids).logits
            state = model(ids[:, :7]).state
            flat = flatten(state)
            loaded = rebuild(model.initial_state(2), flat.tensors, flat.values)
            assert torch.equal(model(ids[:, 7:], state=loaded).logits, model(ids[:, 7:], state=state).logits)
            swapped = model(ids[:, 7:].flip(0), state=loaded.select(torch.tensor([1, 0]))).logits
        assert relative(swapped.flip(0), whole[:, 7:]) < LIMIT

    def test_other_optimizers_keep_the_state_they_had(self):
        names = flatten(build(settings()).initial_state(1)).form.values()
        assert "Watched" not in names
        assert "Watched" in flatten(build(given()).initial_state(1)).form.values()


class TestGradients:
    @pytest.mark.parametrize("erase", ERASE)
    @pytest.mark.parametrize("mixer", ["attention", "self_modifying"])
    def test_second_order_is_that_of_the_loss(self, mixer, erase):
        document = given(erase, mixer=mixer, order="second_order", rates=(0.003, 0.002))
        resets = torch.zeros(2, 20, dtype=torch.bool)
        resets[1, 12] = True
        found, expected = finite_difference(build(document), tokens(2, 21), resets)
        assert found == pytest.approx(expected, rel=1e-5)
        first, _ = finite_difference(build(given(erase, mixer=mixer, rates=(0.003, 0.002))), tokens(2, 21), resets)
        assert abs(first - expected) > 1e-3 * abs(expected)

    @pytest.mark.parametrize("order", ["first_order", "second_order"])
    def test_recomputation_changes_nothing(self, order):
        ids, found = tokens(2, 21), []
        for recompute in ("none", "block"):
            model = build(given(order=order), recompute=recompute)
            loss = token_losses(model(ids[:, :-1]).logits, ids[:, 1:]).mean()
            found.append(torch.autograd.grad(loss, list(model.parameters())))
        assert all(relative(a, b) < LIMIT for a, b in zip(*found, strict=True))

    def test_first_order_keeps_no_graph(self):
        state = build(given())(tokens(2, 21)).state
        assert not any(tensor.requires_grad for tensor in iterate_tensors(state.in_context.levels))


class TestWatchedLayer:
    def test_the_answer_and_its_gradients_are_those_of_the_layer(self):
        layer, x = FastLinear(3, 4).double(), torch.randn(2, 5, 3, dtype=torch.float64).requires_grad_()
        distance = torch.randn(2, 4, 3, dtype=torch.float64).requires_grad_()
        place = torch.zeros(2, 3, 3, dtype=torch.float64).requires_grad_()
        found = layer(x, Watched(distance, place))
        expected = layer(x, distance)
        assert torch.equal(found, expected)
        slopes = torch.autograd.grad(found.square().sum(), [x, distance, place])
        assert all(map(torch.equal, slopes, torch.autograd.grad(expected.square().sum(), [x, distance])))
        torch.testing.assert_close(slopes[2], x.mT @ x)

    def test_a_place_that_was_used_costs_nothing_more(self):
        layer, x = FastLinear(3, 4), torch.randn(2, 5, 3).requires_grad_()
        place = torch.zeros(2, 3, 3).requires_grad_()
        found = layer(x, Watched(torch.zeros(2, 4, 3), place)).sum()
        (moment,) = torch.autograd.grad(found, place, retain_graph=True)
        place.requires_grad_(False)
        found.backward()
        assert moment.any()
        assert place.grad is None

    def test_autocast_does_not_round_the_sum(self):
        layer, x = FastLinear(3, 4), torch.randn(2, 500, 3)
        place = torch.zeros(2, 3, 3).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x, Watched(torch.zeros(2, 4, 3), place))
            (moment,) = torch.autograd.grad(y.sum(), place)
        torch.testing.assert_close(moment, x.mT @ x)


def test_it_trains_under_bfloat16_autocast():
    model, ids = build(given(init_std=0.02), dtype=torch.float32), tokens(2, 27)
    expected = model(ids[:, :-1]).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(ids[:, :-1])
        token_losses(out.logits, ids[:, 1:]).mean().backward()
    assert {tensor.dtype for tensor in iterate_tensors(out.state.in_context.levels)} == {torch.float32}
    # bfloat16 keeps 8 bits: 0.4 % a product, over some ten products in a row
    assert (out.logits.float() - expected).norm() / expected.norm() < 3e-2


def test_a_configuration_comes_back_as_it_was():
    config = ModelConfig.model_validate(given("whole"))
    assert ModelConfig.model_validate_json(config.model_dump_json()) == config
    kinds = re.findall(r'"kind":"dgd","erase":"(\w+)"', config.model_dump_json())
    assert kinds == ["whole", "whole"]
