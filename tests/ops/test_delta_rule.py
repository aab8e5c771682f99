"""The chunk form of the delta rule against the token-by-token reference, outputs, states and gradients, in float64."""

import warnings
from importlib.util import find_spec

import pytest
import torch
from torch.nn import functional

from nested_lm.errors import ConfigError
from nested_lm.ops.delta_rule import chunked as delta_rule
from nested_lm.ops.delta_rule import fla as delta_rule_fla
from nested_lm.ops.delta_rule import reference as delta_rule_reference
from nested_lm.ops.memory.state import unit

LIMIT = 1e-10  # relative, float64: rounding of a few hundred chained products


class Problem:
    """Random inputs of 2 rows and 3 heads; keys are of unit length."""

    def __init__(self, tokens, *, largest_rate=1.0, decays=True, seed=0, keys=None):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.tokens = tokens
        key = unit(draw(2, tokens, 3, 5))
        if keys == "one":
            key = key[:, :1].expand_as(key).clone()
        self.inputs = {
            "query": draw(2, tokens, 3, 5),
            "key": key,
            "value": draw(2, tokens, 3, 4),
            "rate": largest_rate * torch.sigmoid(draw(2, tokens, 3)),
            "log_decay": functional.logsigmoid(draw(2, tokens, 3) + 2) if decays else None,
            "state": draw(2, 3, 5, 4),
        }

    def run(self, function, *, resets=None, without=(), **kwargs):
        inputs = {name: x for name, x in self.inputs.items() if name not in without}
        leaves = {name: None if x is None else x.clone().requires_grad_() for name, x in inputs.items()}
        output = function(**leaves, resets=resets, **kwargs)
        weights = torch.linspace(-1, 1, output.reads.numel(), dtype=torch.float64).view_as(output.reads)
        ends = torch.linspace(1, -2, output.state.numel(), dtype=torch.float64).view_as(output.state)
        found = [x for x in leaves.values() if x is not None]
        return [*output, *torch.autograd.grad((output.reads * weights).sum() + (output.state * ends).sum(), found)]


def resets_at(tokens, *places):
    resets = torch.zeros(2, tokens, dtype=torch.bool)
    for row, token in places:
        resets[row, token] = True
    return resets


def worst(found, expected):
    return max(
        ((a - b).abs().max() / b.abs().max().clamp_min(1e-300)).item() for a, b in zip(found, expected, strict=True)
    )


RESETS = {
    "none": None,
    "inside chunks": resets_at(37, (0, 0), (0, 3), (0, 4), (1, 15), (1, 36)),
    "on borders": resets_at(37, (0, 8), (1, 16), (1, 32)),
}


@pytest.mark.parametrize("resets", RESETS.values(), ids=RESETS.keys())
@pytest.mark.parametrize("chunk", [1, 8, 64])
class TestChunkFormEqualsReference:
    @pytest.mark.parametrize(("largest_rate", "decays"), [(1.0, True), (1.0, False), (2.0, True), (2.0, False)])
    def test_gated_delta_rule(self, resets, chunk, largest_rate, decays):
        problem = Problem(37, largest_rate=largest_rate, decays=decays)
        expected = problem.run(delta_rule_reference.gated_delta_rule, resets=resets)
        found = problem.run(delta_rule.gated_delta_rule, resets=resets, chunk=chunk)
        assert worst(found, expected) < LIMIT

    def test_linear_attention(self, resets, chunk):
        problem = Problem(37)
        without = ("rate", "log_decay")
        expected = problem.run(delta_rule_reference.linear_attention, resets=resets, without=without)
        found = problem.run(delta_rule.linear_attention, resets=resets, without=without, chunk=chunk)
        assert worst(found, expected) < LIMIT


def test_one_key_for_all_tokens_equals_reference():
    problem = Problem(70, keys="one", largest_rate=2.0)
    expected = problem.run(delta_rule_reference.gated_delta_rule)
    assert worst(problem.run(delta_rule.gated_delta_rule), expected) < LIMIT


def test_float32_stays_close_on_one_key_and_strong_decay():
    problem = Problem(300, keys="one")
    problem.inputs["log_decay"] = problem.inputs["log_decay"] * 20  # kept down to 1e-9 a token
    expected = delta_rule_reference.gated_delta_rule(**problem.inputs, resets=None)
    single = {name: x.float() for name, x in problem.inputs.items()}
    found = delta_rule.gated_delta_rule(**single, resets=None)
    assert found.reads.dtype == torch.float32
    assert worst(found, expected) < 1e-5  # 24 bits, over 64 chained products


def test_a_stream_cut_anywhere_equals_one_pass():
    problem = Problem(20)
    whole = delta_rule.gated_delta_rule(**problem.inputs, resets=None, chunk=8)
    for cut in (1, 7, 8, 13):
        inputs = problem.inputs
        per_token = {name: x for name, x in inputs.items() if name != "state"}
        first = delta_rule.gated_delta_rule(
            **{name: x[:, :cut] for name, x in per_token.items()}, state=inputs["state"], resets=None, chunk=8
        )
        second = delta_rule.gated_delta_rule(
            **{name: x[:, cut:] for name, x in per_token.items()}, state=first.state, resets=None, chunk=8
        )
        reads = torch.cat([first.reads, second.reads], dim=1)
        assert worst([reads, second.state], whole) < LIMIT


def test_worked_numbers_of_one_key():
    """Key 1, rate beta, decay alpha: S_t = alpha (1 - beta) S_{t-1} + beta v_t."""
    ones = torch.ones(1, 3, 1, 1, dtype=torch.float64)
    output = delta_rule.gated_delta_rule(
        ones,
        ones,
        torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64).view(1, 3, 1, 1),
        rate=torch.full((1, 3, 1), 0.5, dtype=torch.float64),
        log_decay=torch.full((1, 3, 1), 0.8, dtype=torch.float64).log(),
        state=torch.full((1, 1, 1, 1), 10.0, dtype=torch.float64),
        resets=None,
    )
    expected = [4.0 + 0.5, 1.8 + 1.0, 1.12 + 2.0]
    assert output.reads.flatten().tolist() == pytest.approx(expected, rel=1e-14)


def test_a_full_write_replaces_the_value_and_rate_two_reflects():
    key = unit(torch.randn(1, 1, 1, 5, dtype=torch.float64))
    value = torch.randn(1, 1, 1, 4, dtype=torch.float64)
    state = torch.randn(1, 1, 5, 4, dtype=torch.float64)
    for rate, share in ((1.0, 0.0), (2.0, -1.0)):
        output = delta_rule.gated_delta_rule(
            key, key, value, rate=torch.full((1, 1, 1), rate).double(), log_decay=None, state=state, resets=None
        )
        before = (key[0, 0] @ state[0, 0])[0]
        torch.testing.assert_close(output.reads[0, 0, 0], share * before + rate * value[0, 0, 0])


class TestPublishedRecurrence:
    """Gated DeltaNet as flash-linear-attention 0.6.0 computes it token by token."""

    def test_equals_the_recurrence_written_again(self):
        """h *= exp(g); h += k (beta (v - k h)); o = q h / sqrt(K)."""
        problem = Problem(29)
        inputs = problem.inputs
        q, k, v = inputs["query"] / 5**0.5, inputs["key"], inputs["value"]
        h = inputs["state"].clone()
        outputs = []
        for t in range(29):
            h = h * inputs["log_decay"][:, t].exp()[..., None, None]
            delta = (v[:, t] - (h * k[:, t, :, :, None]).sum(-2)) * inputs["rate"][:, t, :, None]
            h = h + k[:, t, :, :, None] * delta[:, :, None, :]
            outputs.append((q[:, t, :, :, None] * h).sum(-2))
        found = delta_rule.gated_delta_rule(**(inputs | {"query": q}), resets=None, chunk=16)
        assert worst(found, [torch.stack(outputs, dim=1), h]) < LIMIT

    @pytest.mark.skipif(not delta_rule_fla.is_installed(), reason="flash-linear-attention (extra gpu) is not installed")
    def test_equals_its_own_naive_function(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a machine without GPU
            from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
        inputs = {name: x.float() for name, x in Problem(29).inputs.items()}
        expected = naive_recurrent_gated_delta_rule(
            inputs["query"],
            inputs["key"],
            inputs["value"],
            beta=inputs["rate"],
            g=inputs["log_decay"],
            initial_state=inputs["state"],
            output_final_state=True,
        )
        inputs["query"] = inputs["query"] / 5**0.5
        found = delta_rule.gated_delta_rule(**inputs, resets=None, chunk=16)
        assert worst(found, expected) < 1e-5  # it computes in float32


class TestKernelBackend:
    def test_absent_library_is_refused_with_the_repair(self, monkeypatch):
        monkeypatch.setattr(delta_rule_fla, "find_spec", lambda name: None)
        with pytest.raises(ConfigError, match=r"not installed; run pip install .*gpu.* or set .*backend=torch"):
            delta_rule_fla.check_usable(torch.device("cpu"))

    def test_a_machine_without_gpu_is_refused_with_the_repair(self, monkeypatch):
        monkeypatch.setattr(delta_rule_fla, "find_spec", lambda name: object())
        with pytest.raises(ConfigError, match=r"tensors are on `cpu`; .* CUDA GPU only"):
            delta_rule_fla.check_usable(torch.device("cpu"))

    def test_rows_are_laid_behind_each_other_with_their_documents(self):
        resets = resets_at(6, (0, 0), (0, 4), (1, 2))
        state = torch.arange(1.0, 3.0).view(2, 1, 1, 1)
        bounds, before, last = delta_rule_fla.documents_in_one_row(resets, state)
        assert bounds.tolist() == [0, 4, 6, 8, 12]
        assert before.flatten().tolist() == [0.0, 0.0, 2.0, 0.0]  # only row 1 goes on with an earlier document
        assert last.tolist() == [1, 3]

    @pytest.mark.skipif(
        not (torch.cuda.is_available() and find_spec("fla")), reason="needs a CUDA GPU and flash-linear-attention"
    )
    @pytest.mark.parametrize("resets", [None, RESETS["inside chunks"]])
    @pytest.mark.parametrize("name", ["gated_delta_rule", "linear_attention"])
    def test_kernels_stay_close_to_the_chunk_form(self, name, resets):
        generator = torch.Generator().manual_seed(0)

        def draw(*shape):
            return torch.randn(*shape, generator=generator)

        inputs = {
            "query": unit(draw(2, 37, 2, 64)),
            "key": unit(draw(2, 37, 2, 64)),
            "value": draw(2, 37, 2, 64),
            "state": draw(2, 2, 64, 64),
        }
        if name == "gated_delta_rule":
            inputs |= {"rate": draw(2, 37, 2).sigmoid(), "log_decay": functional.logsigmoid(draw(2, 37, 2) + 2)}
        inputs = {key: x.cuda() for key, x in inputs.items()}
        resets = None if resets is None else resets.cuda()
        expected = getattr(delta_rule, name)(**inputs, resets=resets)
        rounded = {key: x if key in ("state", "log_decay") else x.bfloat16() for key, x in inputs.items()}
        found = getattr(delta_rule_fla, name)(**rounded, resets=resets)
        assert worst([x.float() for x in found], expected) < 3e-2  # bfloat16 keeps 8 bits
