"""The three scales are what their names say, and every baseline is as large as Hope beside it."""

import pytest

from nested_lm.config.compose import preset_names
from nested_lm.config.load import load_run
from nested_lm.nn.sizing import count_parameters

SCALES = {"pilot": (160e6, 3e9), "mid": (760e6, 30e9), "target": (1.3e9, 100e9)}
SIZE_TOLERANCE = 0.05  # of Hope's parameters against the name of the scale
MATCH_TOLERANCE = 0.02  # of a baseline's parameters against Hope's
BASELINES = [name for name in preset_names() if name.startswith("baselines/") and name.rpartition("_")[2] in SCALES]


@pytest.fixture(scope="module")
def sizes() -> dict[str, int]:
    """Parameters of Hope by scale."""
    return {scale: count_parameters(load_run(f"hope/{scale}").model)["total"] for scale in SCALES}


@pytest.mark.parametrize("scale", SCALES)
def test_scale_name_is_true(scale, sizes):
    parameters, tokens = SCALES[scale]
    run = load_run(f"hope/{scale}")
    assert abs(sizes[scale] / parameters - 1) < SIZE_TOLERANCE
    assert run.train.budget_tokens == tokens
    assert run.train.step_tokens == 2**19
    assert all(period % run.train.step_tokens == 0 for period in run.model.channel.periods)


@pytest.mark.parametrize("baseline", BASELINES)
def test_baseline_has_hopes_size_and_differs_in_the_model_alone(baseline, sizes):
    scale = baseline.rpartition("_")[2]
    hope, run = load_run(f"hope/{scale}"), load_run(baseline)
    assert abs(count_parameters(run.model)["total"] / sizes[scale] - 1) < MATCH_TOLERANCE
    ours, theirs = hope.model_dump(), run.model_dump()
    assert {key for key in ours if ours[key] != theirs[key]} == {"name", "output_dir", "model"}
    for key in ("vocab_size", "width", "num_layers", "tie_embeddings"):
        assert ours["model"][key] == theirs["model"][key]


def test_every_baseline_exists_at_every_scale():
    arms = {name.removesuffix("_demo") for name in preset_names() if name.startswith("baselines/")}
    arms = {arm for arm in arms if arm.rpartition("_")[2] not in {*SCALES, "chronological", "recall"}}
    assert {f"{arm}_{scale}" for arm in arms for scale in SCALES} == set(BASELINES)
    assert {"baselines/transformer", "baselines/titans_lmm", "baselines/titans_mal"} <= arms
    assert len(arms) == 11


def test_the_target_grows_its_context():
    assert load_run("hope/target").train.context_lengths == (2048, 4096, 8192)
    assert load_run("hope/pilot").train.context_lengths == (4096,)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("devices", [1, 8, 64])
def test_a_step_can_be_shared_by_common_numbers_of_devices(scale, devices):
    from nested_lm.train.strategies.base import micro_batches

    train = load_run(f"hope/{scale}").train
    micro, rows = micro_batches(train, devices)
    assert micro * rows * devices * train.context_length == train.step_tokens
