"""Costs that a dry run states: hand counts, straight lines that hold, and refusals."""

import pytest

from nested_lm.config.load import load_run
from nested_lm.config.model import ModelConfig
from nested_lm.errors import ConfigError
from nested_lm.train.costs import count as costs
from nested_lm.train.costs.probe import run_probe

DEMOS = ["gated_delta_net", "sliding_window", "titans_lmm", "titans_mac"]
TRANSFORMER = {
    "vocab_size": 320,
    "width": 32,
    "num_layers": 3,
    "mixer": {"kind": "attention", "num_heads": 2},
    "channel": {"kind": "swiglu", "expansion": 2.0},
}


def test_a_transformer_by_hand():
    tokens, width, layers = 64, 32, 3
    found = costs.count_costs(ModelConfig.model_validate(TRANSFORMER), tokens, bfloat16=False)
    per_token = {part: count / tokens for part, count in found.forward.items()}
    assert per_token == {
        "logits": 2 * width * 320,
        "projections": layers * 2 * 4 * width**2,
        "memory": 0,
        "attention": layers * 2 * tokens * width,  # half of 4, causal
        "channel": layers * 2 * 3 * width * 2 * width,
    }
    assert found.training == pytest.approx(3 * sum(found.forward.values()))
    assert found.state_bytes == layers * (2 * tokens * width * 4 + tokens * 8)


@pytest.mark.parametrize("name", ["hope/demo", *(f"baselines/{name}_demo" for name in DEMOS)])
def test_two_short_probes_say_what_a_longer_one_counts(name):
    model = load_run(name).model
    first, second = costs._probe_lengths(model, 2**16)
    tokens = max(2 * second - first, 4 * (getattr(model.mixer, "window", None) or 0))
    direct = run_probe(model, 1, tokens, bfloat16=False)
    found = costs.count_costs(model, tokens, bfloat16=False)
    for part, count in direct.parts.items():
        assert found.forward[part] == pytest.approx(count * (1 if part == "logits" else model.num_layers)), part
    backward = model.num_layers * direct.backward_block + direct.backward_head
    assert found.training - sum(found.forward.values()) == pytest.approx(backward)
    assert found.kept["none"].at(1) == pytest.approx(direct.kept, rel=0.01)
    assert found.state_bytes == pytest.approx(model.num_layers * direct.state)


def test_memories_that_are_to_run_in_c_are_counted_as_in_torch():
    """Counting goes by shapes alone, which only the torch form can."""
    counted = [costs.count_costs(load_run("hope/demo", [f"model.mixer.backend={name}"]).model, 256, bfloat16=False)
               for name in ("cpu", "torch", "auto")]  # fmt: skip
    assert counted[0] == counted[1] == counted[2]


@pytest.mark.parametrize("name", ["hope/target", "baselines/titans_lmm_target", "baselines/titans_mac_pilot"])
def test_probes_are_a_few_chunks(name):
    """A dry run takes seconds, at whatever context."""
    model = load_run(name).model
    memory = getattr(model.mixer, "memory", model.mixer)
    assert max(costs._probe_lengths(model, 2**16)) <= 16 * memory.chunk


def test_separate_channels_of_a_convolution_are_not_counted_as_a_matrix():
    model = load_run("baselines/gated_delta_net_demo").model
    found = costs.count_costs(model, 128, bfloat16=False)
    assert 2.9 < found.training / sum(found.forward.values()) < 4.5


def test_stages_of_a_curriculum_add_up_to_the_budget():
    train = load_run("hope/target").train
    found = costs.stages(train)
    assert [length for length, _ in found] == [2048, 4096, 8192]
    assert sum(tokens for _, tokens in found) == train.num_steps * train.step_tokens


def test_without_a_device_nothing_is_said_of_one():
    lines = costs.describe_costs(load_run("hope/demo"), device=None, mfu=0.3, devices=1)
    said = "\n".join(text for _, text in lines)
    assert "MFLOP a token" in said
    assert "GB a device with 1" in said
    assert "fits" not in said
    assert lines[-1] == ("time", "not known of this machine; --device-name h100 states that of an H100")


@pytest.mark.parametrize(("device", "mfu", "said"), [("abacus", 0.3, "known are h100"), ("h100", 0.0, "above 0")])
def test_bad_assumptions_are_refused(device, mfu, said):
    with pytest.raises(ConfigError, match=said):
        costs.describe_costs(load_run("hope/demo"), device=device, mfu=mfu, devices=1)
