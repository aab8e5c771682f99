"""The language model: streams, packing, isolation, initialisation, roles. In float64 where equality is claimed."""

import math
from copy import deepcopy

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from nested_lm.config.load import config_hash
from nested_lm.config.model import ModelConfig
from nested_lm.nn.model import LanguageModel, token_losses
from nested_lm.nn.sizing import count_parameters
from nested_lm.ops.memory import chunked as memory_chunked

LIMIT = 1e-10  # relative, float64

HOPE = {
    "vocab_size": 61,
    "width": 12,
    "num_layers": 2,
    "mixer": {"kind": "self_modifying", "num_heads": 2, "head_width": 6, "chunk": 4},
    "channel": {
        "kind": "cms",
        "levels": [{"period_tokens": 64, "expansion": 1.5}, {"period_tokens": 128, "expansion": 2.0}],
    },
}
HOPE_IN_TORCH = HOPE | {"mixer": HOPE["mixer"] | {"backend": "torch"}}
TRANSFORMER = HOPE | {
    "mixer": {"kind": "attention", "num_heads": 2},
    "channel": {"kind": "swiglu", "expansion": 2.0},
}


def build(settings, dtype=torch.float64, seed=0, **kwargs):
    model = LanguageModel(ModelConfig.model_validate(settings), **kwargs).to(dtype)
    model.initialise(seed)
    return model


def tokens(*shape, seed=0):
    return torch.randint(0, 61, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"width": 24}, "width is 12 there and 24 here"),
        ({"mixer": HOPE["mixer"] | {"chunk": 8}}, "mixer.chunk is 4 there and 8 here"),
        (TRANSFORMER, 'mixer.kind is "self_modifying" there and "attention" here'),
    ],
)
def test_a_state_of_another_model_is_refused_by_name_and_hash(given, said):
    model, other, ids = build(HOPE), build(HOPE | given), tokens(1, 5)
    state = model(ids).state
    with pytest.raises(ValueError, match="Go on with the model that made it") as error:
        other(ids, state=state)
    assert said in str(error.value)
    assert config_hash(model.config) in str(error.value)
    assert config_hash(other.config) in str(error.value)


def test_a_state_goes_on_in_a_copy_of_its_model_and_with_another_backend():
    model, ids = build(HOPE), tokens(1, 5)
    state = model(ids).state
    expected = model(ids, state=state).logits
    assert torch.equal(deepcopy(model)(ids, state=state).logits, expected)
    assert relative(build(HOPE_IN_TORCH)(ids, state=state).logits, expected) < LIMIT


def relative(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("settings", [HOPE, HOPE_IN_TORCH, TRANSFORMER], ids=["hope", "hope-torch", "transformer"])
class TestBothModels:
    @pytest.mark.parametrize("cut", [1, 3, 4, 7, 16, 18])
    def test_a_stream_cut_anywhere_equals_one_pass(self, settings, cut):
        model, ids = build(settings), tokens(2, 19)
        whole = model(ids)
        first = model(ids[:, :cut])
        second = model(ids[:, cut:], state=first.state)
        assert relative(torch.cat([first.logits, second.logits], dim=1), whole.logits) < LIMIT
        assert second.state.position == 19

    def test_token_by_token_equals_one_pass(self, settings):
        model, ids = build(settings), tokens(2, 11)
        state, logits = None, []
        for t in range(11):
            out = model(ids[:, t : t + 1], state=state)
            state = out.state
            logits.append(out.logits)
        assert relative(torch.cat(logits, dim=1), model(ids).logits) < LIMIT

    def test_a_packed_document_equals_the_document_alone(self, settings):
        model, ids = build(settings), tokens(2, 20)
        resets = torch.zeros(2, 20, dtype=torch.bool)
        resets[:, 0] = resets[0, 8] = resets[1, 12] = True
        packed = model(ids, resets=resets).logits
        assert relative(packed[0, 8:], model(ids[:1, 8:]).logits[0]) < LIMIT
        assert relative(packed[1, 12:], model(ids[1:, 12:]).logits[0]) < LIMIT
        assert relative(packed[0, :8], model(ids[:1, :8]).logits[0]) < LIMIT

    def test_a_packed_stream_can_be_cut(self, settings):
        model, ids = build(settings), tokens(2, 20)
        resets = torch.zeros(2, 20, dtype=torch.bool)
        resets[:, 0] = resets[0, 8] = resets[1, 16] = True
        whole = model(ids, resets=resets).logits
        for cut in (5, 8, 9, 17):
            first = model(ids[:, :cut], resets=resets[:, :cut])
            second = model(ids[:, cut:], resets=resets[:, cut:], state=first.state)
            assert relative(torch.cat([first.logits, second.logits], dim=1), whole) < LIMIT

    def test_future_tokens_do_not_change_past_logits(self, settings):
        model, ids = build(settings), tokens(1, 17)
        changed = ids.clone()
        changed[0, 10] = (changed[0, 10] + 1) % 61
        before, after = model(ids).logits, model(changed).logits
        assert relative(after[:, :10], before[:, :10]) < 1e-13
        assert not torch.allclose(after[:, 10:], before[:, 10:])

    def test_rows_do_not_see_each_other(self, settings):
        model, ids = build(settings), tokens(3, 17)
        alone = model(ids[1:2]).logits
        assert relative(model(ids).logits[1:2], alone) < LIMIT

    def test_a_lent_state_is_not_changed(self, settings):
        model, ids = build(settings), tokens(2, 12)
        state = model(ids[:, :6]).state
        before = [tensor.clone() for tensor in _tensors(state)]
        model(ids[:, 6:], state=state)
        assert all(torch.equal(a, b) for a, b in zip(_tensors(state), before, strict=True))

    def test_a_forked_state_continues_like_its_source(self, settings):
        model, ids = build(settings), tokens(2, 12)
        state = model(ids[:, :6]).state
        forked = model(ids[[1, 1, 0], 6:], state=state.select(torch.tensor([1, 1, 0]))).logits
        expected = model(ids[:, 6:], state=state).logits
        assert relative(forked, expected[[1, 1, 0]]) < LIMIT

    def test_initial_loss_is_the_logarithm_of_the_vocabulary(self, settings):
        model, ids = build(settings, dtype=torch.float32), tokens(8, 33)
        loss = token_losses(model(ids[:, :-1]).logits, ids[:, 1:]).mean().item()
        assert loss == pytest.approx(math.log(61), abs=0.05)

    def test_the_same_seed_builds_the_same_model(self, settings):
        one, same, other = build(settings), build(settings), build(settings, seed=1)
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
        assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))

    def test_every_parameter_is_set_gets_a_gradient_and_has_a_role(self, settings):
        model, ids = build(settings), tokens(2, 17)
        token_losses(model(ids[:, :-1]).logits, ids[:, 1:]).mean().backward()
        for name, parameter in model.named_parameters():
            assert torch.isfinite(parameter).all(), name
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
        assert set(model.parameter_roles()) == {name for name, _ in model.named_parameters()}

    def test_recomputation_gives_the_same_gradients(self, settings):
        ids = tokens(2, 17)
        gradients = []
        for recompute in ("none", "chunk", "block"):
            model = build(settings, recompute=recompute)
            token_losses(model(ids[:, :-1]).logits, ids[:, 1:]).mean().backward()
            gradients.append([parameter.grad for parameter in model.parameters()])
        for found in gradients[1:]:
            assert all(relative(a, b) < 1e-12 for a, b in zip(found, gradients[0], strict=True))

    def test_bfloat16_autocast_stays_close_and_keeps_fast_weights_in_float32(self, settings):
        model, ids = build(settings, dtype=torch.float32), tokens(2, 33)
        expected = model(ids).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(ids)
        error = (out.logits.float() - expected).norm() / expected.norm()
        # bfloat16 keeps 8 bits: 0.4 % a product, over some ten products in a row, which rates beyond 1 do not forget
        assert error < 6e-2
        for layer in out.state.layers:
            if hasattr(layer, "memory"):
                assert layer.memory.current.inner.dtype == torch.float32

    def test_counted_parameters_are_those_of_the_built_model(self, settings):
        config = ModelConfig.model_validate(settings)
        counts = count_parameters(config)
        built = sum(parameter.numel() for parameter in LanguageModel(config).parameters())
        assert counts["total"] == built == sum(counts.values()) - counts["total"]


def _tensors(state):
    from nested_lm.nn.state import iterate_tensors

    return iterate_tensors(state.layers)


def test_gradient_of_the_whole_model_is_a_finite_difference():
    model, ids = build(HOPE | {"num_layers": 1}), tokens(1, 10)
    parameters = list(model.parameters())

    def loss():
        return token_losses(model(ids[:, :-1]).logits, ids[:, 1:]).mean()

    gradients = torch.autograd.grad(loss(), parameters)
    generator = torch.Generator().manual_seed(4)
    directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    expected = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True)).item()
    values = []
    step = 1e-7
    with torch.no_grad():
        for sign in (1, -1):
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter += sign * step * direction
            values.append(loss().item())
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter -= sign * step * direction
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("recompute", "keeps"), [("none", True), ("block", False)])
def test_block_checkpoints_drop_what_the_chunks_would_keep(monkeypatch, recompute, keeps):
    storages = []

    def watched(*args, **kwargs):
        chunk = forward_chunk(*args, **kwargs)
        leaves = tree_leaves(chunk)
        storages.extend(StorageWeakRef(x.untyped_storage()) for x in leaves if isinstance(x, torch.Tensor))
        return chunk

    forward_chunk = memory_chunked.forward_chunk
    monkeypatch.setattr(memory_chunked, "forward_chunk", watched)
    logits = build(HOPE_IN_TORCH, recompute=recompute)(tokens(2, 17)).logits
    assert storages
    assert logits.requires_grad
    assert any(not storage.expired() for storage in storages) == keeps


def test_hope_has_constant_state_and_attention_does_not():
    hope, transformer = build(HOPE), build(TRANSFORMER)
    assert hope.has_constant_state
    assert not transformer.has_constant_state
    short, long = hope(tokens(1, 8)).state, hope(tokens(1, 80)).state
    assert short.num_bytes() == long.num_bytes()
    assert transformer(tokens(1, 8)).state.num_bytes() < transformer(tokens(1, 80)).state.num_bytes()


def test_a_document_start_inside_a_chunk_is_refused():
    resets = torch.zeros(1, 12, dtype=torch.bool)
    resets[0, 6] = True
    with pytest.raises(ValueError, match=r"row 0 starts a document at token 6 .* inside a chunk of 4 tokens"):
        build(HOPE)(tokens(1, 12), resets=resets)


def test_roles_name_levels_and_memories():
    roles = build(HOPE).parameter_roles()
    assert roles["embedding.weight"].kind == "embedding"
    assert roles["blocks.0.mixer.start_inner"].kind == "memory"
    assert roles["blocks.1.channel.levels.1.inner.weight"] == ("matrix", 1)
    assert roles["blocks.1.channel.levels.0.norm.weight"] == ("vector", 0)
    assert roles["blocks.0.mixer.conv.weight"].kind == "vector"
    assert roles["blocks.0.mixer.qkv.weight"] == ("matrix", None)


def test_statistics_name_every_memory():
    stats = build(HOPE)(tokens(2, 9)).stats
    assert {"layer0/rate", "layer1/decay", "layer0/fast_norm/eta", "layer1/fast_norm/memory"} <= set(stats)
    assert all(value.ndim == 0 and not value.requires_grad for value in stats.values())
    assert stats["layer0/fast_norm/memory"] > 0
