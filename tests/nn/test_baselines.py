"""Every baseline preset: equal size, one training step, and what every model must show. In float64 where equality is
claimed; the models are those of the presets with two layers and a small vocabulary.
"""

import functools
import math

import pytest
import torch
from pydantic import ValidationError

from nested_lm.config.compose import preset_names
from nested_lm.config.load import load_run
from nested_lm.config.model import ModelConfig
from nested_lm.errors import ConfigError
from nested_lm.nn.model import LanguageModel, token_losses
from nested_lm.nn.sizing import count_parameters
from nested_lm.nn.state import iterate_tensors
from nested_lm.ops.delta_rule import fla as delta_rule_fla
from nested_lm.optim.groups import plan_groups

LIMIT = 1e-10  # relative, float64
SIZE_TOLERANCE = 0.02
TOKENS = 150  # longer than two windows or segments

PRESETS = [n for n in preset_names() if n.startswith("baselines/") and n.endswith("_demo")]
EXPECTED = {
    "transformer",
    "sliding_window",
    "linear_attention",
    "delta_net",
    "delta_net_negative",
    "gated_delta_net",
    "titans_lmm",
    "titans_mac",
    "titans_mag",
    "titans_mal",
    "hope_attention",
}
SHORT = [n.removeprefix("baselines/").removesuffix("_demo") for n in PRESETS]
every_preset = pytest.mark.parametrize("preset", PRESETS, ids=SHORT)


@functools.cache
def loaded(preset):
    return load_run(preset)


def small(preset, **changes):
    settings = loaded(preset).model.model_dump() | {"vocab_size": 61, "num_layers": 2} | changes
    return ModelConfig.model_validate(settings)


@functools.cache
def build(preset, dtype=torch.float64, recompute="none"):
    model = LanguageModel(small(preset), recompute=recompute).to(dtype)
    model.initialise(0)
    return model


def tokens(*shape, seed=0):
    return torch.randint(0, 61, shape, generator=torch.Generator().manual_seed(seed))


def relative(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture
def _without_gradients():
    with torch.no_grad():
        yield


def test_every_baseline_has_a_preset():
    assert set(SHORT) >= EXPECTED


@every_preset
def test_differs_from_hope_in_the_model_alone_at_equal_size(preset):
    hope, baseline = loaded("hope/demo"), loaded(preset)
    ours, theirs = hope.model_dump(), baseline.model_dump()
    assert {key for key in ours if ours[key] != theirs[key]} == {"name", "output_dir", "model"}
    same = ("vocab_size", "width", "num_layers", "tie_embeddings", "norm_epsilon", "init_std")
    assert all(ours["model"][key] == theirs["model"][key] for key in same)
    sizes = [count_parameters(run.model)["total"] for run in (baseline, hope)]
    assert abs(sizes[0] / sizes[1] - 1) < SIZE_TOLERANCE


@every_preset
def test_one_training_step_lowers_the_loss_and_reaches_every_parameter(preset):
    model = LanguageModel(small(preset))
    model.initialise(0)
    ids = tokens(2, 129)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(2):
        loss = token_losses(model(ids[:, :-1]).logits, ids[:, 1:]).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.abs().sum() > 0, name
        optimizer.step()
    assert losses[0] == pytest.approx(math.log(61), abs=0.05)
    assert losses[1] < losses[0]
    groups = plan_groups(dict(model.named_parameters()), model.parameter_roles(), loaded(preset).train.optimizer)
    assert sorted(name for group in groups for name in group.names) == sorted(dict(model.named_parameters()))


@every_preset
@pytest.mark.usefixtures("_without_gradients")
class TestEveryBaseline:
    def test_a_stream_cut_anywhere_equals_one_pass(self, preset):
        model, ids = build(preset), tokens(2, TOKENS)
        whole = model(ids).logits
        for cuts in ([64], [1, 67, 70, 128]):
            state, logits = None, []
            for part in torch.tensor_split(ids, cuts, dim=1):
                out = model(part, state=state)
                state = out.state
                logits.append(out.logits)
            assert relative(torch.cat(logits, dim=1), whole) < LIMIT

    def test_token_by_token_equals_one_pass(self, preset):
        model, ids = build(preset), tokens(1, 72)
        first = model(ids[:, :60])
        state, logits = first.state, [first.logits]
        for t in range(60, 72):
            out = model(ids[:, t : t + 1], state=state)
            state = out.state
            logits.append(out.logits)
        assert relative(torch.cat(logits, dim=1), model(ids).logits) < LIMIT

    def test_a_packed_document_equals_the_document_alone(self, preset):
        model, ids = build(preset), tokens(2, TOKENS)
        resets = torch.zeros(2, TOKENS, dtype=torch.bool)
        resets[:, 0] = resets[0, 64] = resets[1, 128] = True
        for cut in (0, 70):  # in one call, and carried over two
            state, logits = None, []
            for part in [slice(0, cut), slice(cut, TOKENS)] if cut else [slice(0, TOKENS)]:
                out = model(ids[:, part], resets=resets[:, part], state=state)
                state = out.state
                logits.append(out.logits)
            packed = torch.cat(logits, dim=1)
            assert relative(packed[0, 64:], model(ids[:1, 64:]).logits[0]) < LIMIT
            assert relative(packed[0, :64], model(ids[:1, :64]).logits[0]) < LIMIT
            assert relative(packed[1, 128:], model(ids[1:, 128:]).logits[0]) < LIMIT

    def test_future_tokens_do_not_change_past_logits(self, preset):
        model, ids = build(preset), tokens(1, TOKENS)
        before = model(ids).logits
        for place in (37, 64):
            changed = ids.clone()
            changed[0, place] = (changed[0, place] + 1) % 61
            after = model(changed).logits
            assert relative(after[:, :place], before[:, :place]) < 1e-13
            assert not torch.allclose(after[:, place:], before[:, place:])

    def test_rows_do_not_see_each_other(self, preset):
        model, ids = build(preset), tokens(3, 80)
        assert relative(model(ids).logits[1:2], model(ids[1:2]).logits) < LIMIT

    def test_a_lent_state_is_not_changed_and_can_be_forked(self, preset):
        model, ids = build(preset), tokens(2, 80)
        state = model(ids[:, :60]).state
        before = [tensor.clone() for tensor in iterate_tensors(state.layers)]
        expected = model(ids[:, 60:], state=state).logits
        assert all(torch.equal(a, b) for a, b in zip(iterate_tensors(state.layers), before, strict=True))
        forked = model(ids[[1, 1, 0], 60:], state=state.select(torch.tensor([1, 1, 0]))).logits
        assert relative(forked, expected[[1, 1, 0]]) < LIMIT

    def test_constant_state_is_constant(self, preset):
        model = build(preset)
        short, long = (model(tokens(1, length)).state.num_bytes() for length in (128, 256))
        assert (short == long) == model.has_constant_state
        assert model.has_constant_state == (preset.split("/")[1] not in ("transformer_demo", "hope_attention_demo"))

    def test_bfloat16_autocast_stays_close(self, preset):
        model, ids = build(preset, torch.float32), tokens(2, 80)
        expected = model(ids).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = model(ids).logits
        assert (
            found.float() - expected
        ).norm() / expected.norm() < 5e-2  # 8 bits; worst for MAC, 3.5e-2, which reads its memory twice


@every_preset
def test_recomputation_gives_the_same_gradients(preset):
    ids = tokens(1, 41)
    gradients = []
    for recompute in ("none", "chunk", "block"):
        model = build(preset, recompute=recompute)
        model.zero_grad()
        token_losses(model(ids[:, :-1]).logits, ids[:, 1:]).mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for found in gradients[1:]:
        assert all(relative(a, b) < LIMIT for a, b in zip(found, gradients[0], strict=True))


@pytest.mark.parametrize("kind", ["linear_attention", "delta_net", "gated_delta_net"])
def test_documents_of_a_matrix_memory_start_at_any_token(kind):
    model, ids = build(f"baselines/{kind}_demo"), tokens(2, 90)
    resets = torch.zeros(2, 90, dtype=torch.bool)
    resets[0, 7] = resets[0, 8] = resets[1, 71] = True
    packed = model(ids, resets=resets).logits
    assert relative(packed[0, 8:], model(ids[:1, 8:]).logits[0]) < LIMIT
    assert relative(packed[1, 71:], model(ids[1:, 71:]).logits[0]) < LIMIT


def test_decay_of_gated_delta_net_starts_as_published():
    model = build("baselines/gated_delta_net_demo")
    steps = torch.nn.functional.softplus(model.blocks[0].mixer.step_bias)
    speeds = model.blocks[0].mixer.log_speed.exp()
    assert ((steps > 0.9e-3) & (steps < 0.11)).all()
    assert ((speeds > 0) & (speeds < 16)).all()
    assert speeds.unique().numel() == len(speeds)


class TestTitans:
    def test_a_token_attends_to_persistent_tokens_and_what_it_recalls(self):
        """The first segment recalls the learned start; a later one what was written."""
        model, ids = build("baselines/titans_mac_demo"), tokens(1, 130)
        mixer = model.blocks[0].mixer
        start = mixer.memory.start_inner.detach().clone()
        before = model(ids).logits
        with torch.no_grad():
            mixer.recalled.weight.mul_(2)
            recalled = model(ids).logits
            mixer.recalled.weight.mul_(0.5)
            mixer.attention.tokens.mul_(2)
            persistent = model(ids).logits
            mixer.attention.tokens.mul_(0.5)
        assert torch.equal(start, mixer.memory.start_inner)
        assert not torch.allclose(recalled[:, 0], before[:, 0])
        assert not torch.allclose(persistent[:, 0], before[:, 0])

    def test_the_past_of_a_segment_is_what_the_memory_held_when_it_began(self):
        model, ids = build("baselines/titans_mac_demo"), tokens(1, 100)
        at_border = model(ids[:, :64]).state.layers[0]
        inside = model(ids).state.layers[0]
        assert relative(inside.past.inner, at_border.memory.memory.current.inner) < LIMIT
        assert relative(inside.memory.memory.current.inner, inside.past.inner) > 1e-3
        assert inside.keys.shape[2] == 100 - 64
        assert at_border.keys.shape[2] == 0

    def test_a_document_start_inside_a_segment_is_refused(self):
        resets = torch.zeros(1, 80, dtype=torch.bool)
        resets[0, 48] = True
        with pytest.raises(ValueError, match=r"row 0 starts a document at token 48 .* inside a chunk of 64 tokens"):
            build("baselines/titans_mac_demo")(tokens(1, 80), resets=resets)

    def test_a_segment_must_hold_whole_chunks(self):
        mixer = loaded("baselines/titans_mac_demo").model.mixer.model_dump()
        with pytest.raises(ValidationError, match=r"segment 40 is not a multiple of 16.*try segment=32"):
            small("baselines/titans_mac_demo", mixer=mixer | {"segment": 40})

    @pytest.mark.parametrize("kind", ["mac", "mag", "mal"])
    def test_persistent_tokens_can_be_left_out(self, kind):
        preset = f"baselines/titans_{kind}_demo"
        mixer = loaded(preset).model.mixer.model_dump()
        model = LanguageModel(small(preset, mixer=mixer | {"num_persistent": 0}))
        model.initialise(0)
        assert not any("tokens" in name for name, _ in model.named_parameters())
        assert torch.isfinite(model(tokens(1, 70)).logits).all()

    @pytest.mark.parametrize("kind", ["mac", "mag", "mal"])
    def test_heads_must_divide_the_width(self, kind):
        preset = f"baselines/titans_{kind}_demo"
        mixer = loaded(preset).model.mixer.model_dump()
        with pytest.raises(ValidationError, match=r"width 128 is not a multiple of mixer.num_heads 3"):
            small(preset, mixer=mixer | {"num_heads": 3})


@pytest.mark.parametrize("kind", ["linear_attention", "delta_net", "gated_delta_net"])
class TestBackend:
    def build(self, kind, backend):
        preset = f"baselines/{kind}_demo"
        model = LanguageModel(small(preset, mixer=loaded(preset).model.mixer.model_dump() | {"backend": backend}))
        model.initialise(0)
        return model

    def test_asked_for_and_missing_is_an_error(self, kind, monkeypatch):
        monkeypatch.setattr(delta_rule_fla, "is_installed", lambda: False)
        with pytest.raises(ConfigError, match="flash-linear-attention is not installed"):
            self.build(kind, "fla")(tokens(1, 9))

    def test_auto_is_torch_without_a_gpu(self, kind):
        found, expected = (self.build(kind, backend)(tokens(1, 9)).logits for backend in ("auto", "torch"))
        assert torch.equal(found, expected)


def test_rates_of_delta_net_reach_their_limit_and_not_beyond():
    for preset, limit in (("delta_net", 1.0), ("delta_net_negative", 2.0)):
        assert loaded(f"baselines/{preset}_demo").model.mixer.rate_max == limit
    mixer = loaded("baselines/delta_net_demo").model.mixer.model_dump()
    with pytest.raises(ValidationError, match="less than or equal to 2"):
        small("baselines/delta_net_demo", mixer=mixer | {"rate_max": 2.5})


@pytest.mark.parametrize("feature_map", ["identity", "elu"])
def test_linear_attention_is_the_sum_written_out(feature_map):
    preset = "baselines/linear_attention_demo"
    mixer_config = loaded(preset).model.mixer.model_dump() | {"feature_map": feature_map, "num_heads": 1}
    model = LanguageModel(small(preset, mixer=mixer_config)).double()
    model.initialise(0)
    mixer = model.blocks[0].mixer
    x = torch.randn(1, 9, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    from nested_lm.nn.layers import StepContext

    found, _, _ = mixer(x, StepContext(0, None, None), mixer.initial_state(1))
    query, key, value = (x[0] @ mixer.qkv.weight.T).chunk(3, dim=-1)
    if feature_map == "elu":
        query, key = (torch.where(y > 0, y + 1, y.exp()) for y in (query, key))
    scores = (query @ key.T).tril()
    reads = scores @ value
    reads = reads / reads.square().mean(-1, keepdim=True).add(1e-6).sqrt()
    torch.testing.assert_close(found[0], reads @ mixer.out.weight.T, rtol=1e-10, atol=1e-12)
