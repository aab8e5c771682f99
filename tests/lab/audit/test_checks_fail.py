"""Every check fails on a model that is broken in the way it looks for. A check that cannot fail checks nothing."""

import dataclasses
import functools
from pathlib import Path

import pytest
import torch

from nested_lm.nn.block import Block
from nested_lm.nn.mixers import self_modifying
from nested_lm.nn.mixers.attention import Attention
from nested_lm.nn.mixers.self_modifying import SelfModifyingTitans
from nested_lm.nn.model import LanguageModel
from nested_lm.ops.memory import chunked as memory_chunked
from nested_lm.ops.memory.cpu import backend as memory_cpu
from nested_lm.ops.memory.cpu import library as cpu_library
from nested_lm.ops.update_rules.momentum import GradientDescent
from nested_lm.optim.clocked import ClockedOptimizer
from nested_lm.optim.delta_gradient_descent import DeltaGradientDescent
from nested_lm.optim.level_clock import LevelClock
from nested_lm_lab.audit import memories, optimizers
from nested_lm_lab.audit.runner import CHECKS
from tests.lab.audit.conftest import MODELS

needs_compiler = pytest.mark.skipif(cpu_library.compiler() is None, reason="there is no C compiler")


def break_operation(monkeypatch, module, name, change):
    """Let `change` edit the named arguments, or the output, of an operation."""
    original = getattr(module, name)

    @functools.wraps(original)
    def changed(*args, **kwargs):
        return change(original, *args, **kwargs)

    monkeypatch.setattr(module, name, changed)


def break_memories(monkeypatch, change):
    """The same for the memories, in whichever form a model takes."""
    for module in (memory_chunked, memory_cpu):
        break_operation(monkeypatch, module, "self_modify", change)


def break_blocks(monkeypatch, change):
    """Add something to the input of every block."""
    original = Block.forward

    def forward(self, x, *rest):
        return original(self, x + change(x), *rest)

    monkeypatch.setattr(Block, "forward", forward)


BOTH = [
    pytest.param("torch", memory_chunked, memory_cpu, id="torch"),
    pytest.param("cpu", memory_cpu, memory_chunked, id="cpu", marks=needs_compiler),
]


class TestReference:
    def test_wrong_reads(self, make_subject, missed, monkeypatch):
        def change(original, *args, **kwargs):
            output = original(*args, **kwargs)
            return output._replace(reads=output.reads * (1 + 1e-9))

        break_memories(monkeypatch, change)
        found = missed("reference", make_subject("hope"))
        assert "outputs and states, own chunk size" in found
        assert "outputs and states, chunks of one token" in found

    def test_gradient_stopped_inside(self, make_subject, missed, monkeypatch):
        def change(original, inputs, *args, **kwargs):
            return original(inputs._replace(value=inputs.value.detach()), *args, **kwargs)

        break_memories(monkeypatch, change)
        found = missed("reference", make_subject("hope"))
        assert found == ["outer gradients, own chunk size", "outer gradients, chunks of one token"]

    @pytest.mark.parametrize(("backend", "used", "other"), BOTH)
    def test_the_form_that_the_model_takes_is_compared_and_named(
        self, make_subject, missed, findings, monkeypatch, backend, used, other
    ):
        subject = make_subject("hope", mixer=MODELS["hope"]["mixer"] | {"backend": backend})

        def change(original, *args, **kwargs):
            output = original(*args, **kwargs)
            return output._replace(reads=output.reads * (1 + 1e-9))

        named = {finding.reason for finding in findings("reference", subject).values()}
        assert named == {f"of {used.__name__.removeprefix('nested_lm.').replace('.', '/')}.py"}
        with monkeypatch.context() as patch:
            break_operation(patch, other, "self_modify", change)
            assert missed("reference", subject) == []
        break_operation(monkeypatch, used, "self_modify", change)
        assert "outputs and states, own chunk size" in missed("reference", subject)

    def test_an_operation_that_is_not_known_is_a_miss(self, make_subject, missed, monkeypatch):
        monkeypatch.setattr("nested_lm_lab.audit.probe.OPERATIONS", ())
        for check in ("reference", "ranges", "long_stream"):
            assert len(missed(check, make_subject("delta"))) == 1


class TestStreams:
    def test_a_mixer_that_looks_ahead(self, make_subject, missed, monkeypatch):
        break_blocks(monkeypatch, lambda x: 1e-6 * x.flip(1).cumsum(1).flip(1))
        found = missed("causality", make_subject("transformer"))
        assert found == [f"change of logits before the changed token, {calls}" for calls in ("one call", "two calls")]

    def test_a_model_that_reads_nothing(self, make_subject, missed, monkeypatch):
        break_blocks(monkeypatch, lambda x: -x)
        assert "change of logits at the changed token, one call" in missed("causality", make_subject("transformer"))

    def test_targets_that_leak_past_the_border(self, make_subject, missed, monkeypatch):
        """In-context levels that write with the first token of the next period before they have read it."""
        from nested_lm.nn.channels import in_context

        original = in_context._Reading.pass_over

        def pass_over(self, part, **options):
            return original(self, torch.cat([part[:, 1:], part[:, :1]], dim=1), **options)

        monkeypatch.setattr(in_context._Reading, "pass_over", pass_over)
        assert missed("causality", make_subject("writing"))

    def test_a_dropped_tail(self, make_subject, missed, monkeypatch):
        def change(original, conv, x, tail, resets, **settings):
            return original(conv, x, 0 * tail, resets, **settings)

        break_operation(monkeypatch, self_modifying, "convolved_units", change)
        found = missed("split", make_subject("hope"))
        assert "logits, token by token" in found
        assert len(found) == 4

    def test_a_dropped_border(self, make_subject, missed, monkeypatch):
        """A state whose border is lost goes on from the current weights."""

        def change(original, inputs, start, readout, state, **options):
            return original(inputs, start, readout, state._replace(border=state.current), **options)

        break_memories(monkeypatch, change)
        assert "logits, token by token" in missed("split", make_subject("hope"))

    def test_a_state_that_is_never_used(self, make_subject, missed, monkeypatch):
        original = Attention.forward

        def forward(self, x, *rest):
            mixed, *others = original(self, x, *rest)
            return 0 * mixed, *others

        monkeypatch.setattr(Attention, "forward", forward)
        assert missed("split", make_subject("transformer")) == ["change of logits when the state is dropped"]

    def test_rows_that_mix(self, make_subject, missed, monkeypatch):
        break_blocks(monkeypatch, lambda x: 1e-6 * x.mean(dim=0, keepdim=True))
        found = missed("isolation", make_subject("transformer"))
        assert "logits of rows beside a row that changed" in found
        assert "logits of a row alone" in found
        assert "gradient that one row's loss sends into another row" in found

    def test_documents_that_mix(self, make_subject, missed, monkeypatch):
        def change(original, conv, x, tail, resets, **settings):
            return original(conv, x, tail, None, **settings)

        break_operation(monkeypatch, self_modifying, "convolved_units", change)
        assert missed("isolation", make_subject("hope")) == ["logits of a packed document against the document alone"]

    def test_attention_that_sees_older_documents(self, make_subject, missed, monkeypatch):
        original = Attention.forward

        def forward(self, x, context, state):
            return original(self, x, context._replace(documents=None), state)

        monkeypatch.setattr(Attention, "forward", forward)
        found = missed("isolation", make_subject("transformer"))
        assert found == ["logits of a packed document against the document alone"]


class TestMemories:
    def test_vectors_that_are_not_unit(self, make_subject, missed, monkeypatch):
        def change(original, *args, **kwargs):
            *vectors, tail = original(*args, **kwargs)
            return *(2 * vector for vector in vectors), tail

        break_operation(monkeypatch, self_modifying, "convolved_units", change)
        assert missed("ranges", make_subject("hope")) == ["length of keys, queries and unit values, distance from 1"]

    def test_gates_beyond_their_range(self, make_subject, missed, monkeypatch):
        def change(original, *args, **kwargs):
            output = original(*args, **kwargs)
            return output._replace(decay=output.decay * 1.01, rate=output.rate - 0.01)

        break_memories(monkeypatch, change)
        found = missed("ranges", make_subject("hope"))
        assert found == ["learning rate, share of its largest, smallest", "retention, largest"]

    def test_padding_that_forgets(self, make_subject, missed, monkeypatch):
        def change(original, inputs, *args, **kwargs):
            return original(inputs._replace(decay=inputs.decay.clamp(max=20.0)), *args, **kwargs)

        break_memories(monkeypatch, change)
        assert missed("ranges", make_subject("hope")) == ["change of the state by padding"]

    def test_a_delta_rule_with_rates_above_two(self, make_subject, missed, monkeypatch):
        subject = make_subject("delta")
        assert missed("ranges", subject) == []

        monkeypatch.setattr(
            "nested_lm.nn.mixers.delta_net.torch.sigmoid", lambda x: 2.5 * x.sigmoid().round() + x.sigmoid()
        )
        assert missed("ranges", subject) == ["rate of the delta rule, largest"]

    @pytest.mark.parametrize(
        ("factor", "figure"), [(0.0, "smallest memory after repeated"), (1e6, "largest memory after independent")]
    )
    def test_dead_and_exploding_memories(self, make_subject, missed, monkeypatch, factor, figure):
        def change(original, *args, **kwargs):
            output = original(*args, **kwargs)
            grown = (x * factor for x in output.state.current)
            return output._replace(state=output.state._replace(current=type(output.state.current)(*grown)))

        break_memories(monkeypatch, change)
        assert f"{figure} tokens" in missed("long_stream", make_subject("hope"))

    def test_heads_that_never_write(self, make_subject, missed, monkeypatch):
        def change(original, inputs, *args, **kwargs):
            return original(inputs._replace(rate=inputs.rate - 50), *args, **kwargs)

        break_memories(monkeypatch, change)
        found = missed("long_stream", make_subject("hope"))
        assert "share of heads closed to independent tokens" in found
        assert "smallest memory after independent tokens" in found

    def test_heads_that_only_turn_over_what_they_hold(self, make_subject, missed, monkeypatch):
        def change(original, inputs, *args, **kwargs):
            return original(inputs._replace(rate=inputs.rate + 50), *args, **kwargs)

        break_memories(monkeypatch, change)
        found = missed("long_stream", make_subject("hope", mixer=MODELS["hope"]["mixer"] | {"rate_shares": [1.0]}))
        assert "share of heads that only turn independent tokens over" in found

    def test_a_memory_that_does_not_come_back_after_a_repeated_token(self, make_subject, missed, monkeypatch):
        def change(original, *args, **kwargs):
            output = original(*args, **kwargs)
            kept = (x * (kwargs["position"] < memories.LONG_STREAM) for x in output.state.current)
            return output._replace(state=output.state._replace(current=type(output.state.current)(*kept)))

        break_memories(monkeypatch, change)
        found = missed("long_stream", make_subject("hope"))
        assert found == ["smallest memory after repeated tokens and then others"]

    def test_a_memory_that_fades_to_nothing_is_dead_although_far_from_its_start(self, make_subject, missed):
        mixer = MODELS["hope"]["mixer"] | {"decay_towards": "zero", "decay_horizon_tokens": 4}
        found = missed("long_stream", make_subject("hope", mixer=mixer))
        assert "smallest memory after independent tokens" in found


class TestGradients:
    def test_stopped_in_the_writes(self, make_subject, missed, monkeypatch):
        def change(original, inputs, *args, **kwargs):
            return original(inputs._replace(key=inputs.key.detach()), *args, **kwargs)

        break_memories(monkeypatch, change)
        found = missed("gradients", make_subject("hope", num_layers=1))
        assert "gradient of the loss against its finite difference" in found
        assert "gradient through the writes against its finite difference" in found

    def test_stopped_at_the_state(self, make_subject, missed, monkeypatch):
        monkeypatch.setattr(LanguageModel, "forward", _detached(LanguageModel.forward))
        found = missed("gradients", make_subject("hope", num_layers=1))
        assert "gradient through the writes against its finite difference" in found
        assert "smallest gradient of a head's start, by way of the writes" in found

    def test_one_memory_left_out(self, make_subject, missed, monkeypatch):
        """The v memory's start is a constant: it has no gradient at all, not even through the writes."""

        def change(original, inputs, start, *args, rule, **kwargs):
            index = rule.index("v")
            fixed = []
            for x in start:
                parts = list(x.unbind(1))
                parts[index] = parts[index].detach()
                fixed.append(torch.stack(parts, dim=1))
            return original(inputs, type(start)(*fixed), *args, rule=rule, **kwargs)

        break_memories(monkeypatch, change)
        found = missed("gradients", make_subject("hope", num_layers=1))
        assert "smallest gradient of a head's start, by way of the writes" in found

    def test_a_parameter_without_use(self, make_subject, missed, monkeypatch):
        original = Block.forward

        def forward(self, x, *rest):
            out, *others = original(self, x, *rest)
            return x + (out - x).detach(), *others

        monkeypatch.setattr(Block, "forward", forward)
        assert "smallest gradient of any parameter" in missed("gradients", make_subject("transformer"))


def _detached(original):
    def forward(self, tokens, **options):
        output = original(self, tokens, **options)
        return output._replace(state=output.state.detach())

    return forward


class TestAblations:
    def test_a_switch_that_does_nothing(self, make_subject, missed, monkeypatch):
        original = SelfModifyingTitans.__init__

        def init(self, width, config, **options):
            original(self, width, config.model_copy(update={"erase": "both", "erase_since": "border"}), **options)

        monkeypatch.setattr(SelfModifyingTitans, "__init__", init)
        assert missed("ablations", make_subject("hope", num_layers=1)) == ["change of logits, DGD's erase term off"]

    @needs_compiler
    def test_a_variant_that_the_c_lacks_is_tried_in_torch(self, make_subject, missed):
        mixer = MODELS["hope"]["mixer"] | {"backend": "cpu"}
        assert missed("ablations", make_subject("hope", num_layers=1, mixer=mixer)) == []

    def test_a_variant_that_breaks(self, make_subject, missed, monkeypatch):
        original = SelfModifyingTitans.forward

        def forward(self, x, *rest):
            return original(self, x * (float("nan") if self.rule.momentum else 1.0), *rest)

        monkeypatch.setattr(SelfModifyingTitans, "forward", forward)
        assert missed("ablations", make_subject("hope", num_layers=1)) == ["change of logits, momentum on"]


class TestClocks:
    def test_a_level_that_is_always_due(self, make_subject, missed, monkeypatch):
        monkeypatch.setattr(LevelClock, "due", lambda self, tokens: tuple(range(len(self.periods))))
        found = missed("clock_a", make_subject("hope"))
        assert "changes of a level between its updates, periods of 1, 2 steps" in found

    def test_gradients_that_are_dropped(self, make_subject, missed, monkeypatch):
        original = ClockedOptimizer._collect

        def collect(self, name, *, is_due):
            self._pending.pop(name, None)
            original(self, name, is_due=is_due)

        monkeypatch.setattr(ClockedOptimizer, "_collect", collect)
        assert missed("clock_a", make_subject("hope")) == ["gradient of an update against the sum over its period"]

    def test_a_level_that_never_moves(self, make_subject, missed, monkeypatch):
        original = LevelClock.due
        monkeypatch.setattr(LevelClock, "due", lambda self, tokens: original(self, tokens)[:1])
        found = missed("clock_a", make_subject("hope"))
        assert any(figure.startswith("updates at which a level did not change") for figure in found)

    def test_a_write_by_the_mean(self, make_subject, missed, monkeypatch):
        original = GradientDescent.step

        def step(self, weights, gradient, *rest):
            return original(self, weights, gradient / 4, *rest)

        monkeypatch.setattr(GradientDescent, "step", step)
        found = missed("clock_b", make_subject("writing"))
        assert len(found) == 2
        assert all(figure.startswith("first write of level") for figure in found)

    def test_writes_that_nothing_reads(self, make_subject, missed, monkeypatch):
        from nested_lm.nn.fast_linear import FastLinear

        original = FastLinear.forward

        def forward(self, x, distance=None):
            unread = None if distance is None else distance - distance.detach()
            return original(self, x, unread)

        monkeypatch.setattr(FastLinear, "forward", forward)
        assert missed("clock_b", make_subject("writing")) == ["change of logits after the first write"]

    def test_a_copy_that_moves_early(self, make_subject, missed, monkeypatch):
        from nested_lm.nn.channels import in_context

        original = in_context._Reading.output

        def output(self):
            found = original(self)
            memory = found.state.in_context
            moved = memory._replace(levels=in_context.map_tensors(memory.levels, lambda x: x + 1e-9))
            return found._replace(state=dataclasses.replace(found.state, in_context=moved))

        monkeypatch.setattr(in_context._Reading, "output", output)
        found = missed("clock_b", make_subject("writing"))
        assert any(figure.startswith("changes of a fast copy between its borders") for figure in found)


class TestOptimizers:
    def test_the_printed_rate_of_dgd(self, make_subject, missed, monkeypatch):
        """rate / (1 + rate) as the main text prints it, which holds for inputs of length 1 only."""

        def printed(weights, inputs, output_gradients, *, rate):
            step = rate / (1 + rate)
            return weights - step * torch.outer(weights @ inputs + output_gradients, inputs)

        monkeypatch.setattr(optimizers, "proximal_step_one_row", printed)
        assert missed("optimizers", make_subject("hope")) == ["DGD of one row against the argmin of eq. 56"]

    def test_an_optimizer_that_forgets_a_backward_pass(self, make_subject, missed, monkeypatch):
        original = DeltaGradientDescent._add

        def add(self, layer, read):
            self._forget()
            original(self, layer, read)

        monkeypatch.setattr(DeltaGradientDescent, "_add", add)
        figure = "DGD as a torch optimizer against the argmin of eq. 56"
        assert missed("optimizers", make_subject("hope")) == [figure]

    def test_another_m3(self, make_subject, missed, monkeypatch):
        from nested_lm.ops.update_rules.orthogonal import M3

        original = M3._refresh
        monkeypatch.setattr(
            M3, "_refresh", lambda self, state: original(self, state._replace(collected=0 * state.fast))
        )
        assert missed("optimizers", make_subject("hope")) == ["literal M3 against Algorithm 1 line by line, 12 steps"]

    def test_too_few_iterations(self, make_subject, missed, monkeypatch):
        original = optimizers.newton_schulz
        monkeypatch.setattr(optimizers, "newton_schulz", lambda matrix, *, iterations: original(matrix, iterations=2))
        assert missed("optimizers", make_subject("hope")) == ["smallest singular value after Newton-Schulz"]


class TestTraining:
    def test_a_build_that_draws_without_its_seed(self, make_subject, missed, monkeypatch):
        original = LanguageModel.initialise

        def initialise(self, seed):
            original(self, seed)
            with torch.no_grad():
                self.embedding.weight.add_(1e-6 * torch.randn(self.embedding.weight.shape))

        monkeypatch.setattr(LanguageModel, "initialise", initialise)
        found = missed("seeds", make_subject("transformer"))
        assert "tensors that differ between two builds of one seed" in found
        assert "tensors that differ after two training steps of one seed" in found

    def test_a_seed_that_is_ignored(self, make_subject, missed, monkeypatch):
        original = LanguageModel.initialise
        monkeypatch.setattr(LanguageModel, "initialise", lambda self, seed: original(self, 0))
        assert missed("seeds", make_subject("transformer")) == ["tensors that differ between builds of two seeds"]

    def test_a_resume_that_forgets_its_moments(self, make_subject, missed, monkeypatch):
        monkeypatch.setattr(ClockedOptimizer, "load_state_tensors", lambda self, tensors: None)
        found = missed("resume", make_subject("transformer"))
        assert found == ["tensors that differ between the whole and the resumed run"]

    def test_an_embedding_that_starts_too_large(self, make_subject, missed):
        found = missed("initial_loss", make_subject("transformer", init_std=1.0))
        assert "loss of fresh weights minus ln V" in found
        assert "s^2/2 at the width that was asked for" in found


def test_every_check_is_broken_somewhere_above():
    source = Path(__file__).read_text(encoding="utf-8")
    assert [name for name in CHECKS if f'"{name}"' not in source] == []
