import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from nested_lm.checkpoint import write_checkpoint
from nested_lm.config.evaluation import EvalConfig
from nested_lm.config.load import config_hash, parse_run
from nested_lm.data.shards import TokenDataset
from nested_lm.errors import CheckpointError, ConfigError, DataError, NumericsError
from nested_lm.nn.model import LanguageModel
from nested_lm.storage.commit import current_commit
from nested_lm_lab.evaluation.bootstrap import Bootstrap
from nested_lm_lab.evaluation.results import comparable, load_result
from nested_lm_lab.evaluation.run import evaluate_run
from nested_lm_lab.tasks.language_modelling import BITS, paired_difference

CONTEXT = 16
MODELS = {
    "attention": {
        "mixer": {"kind": "attention", "num_heads": 2},
        "channel": {"kind": "swiglu", "expansion": 2.0},
    },
    "self_modifying": {
        "mixer": {"kind": "self_modifying", "num_heads": 2, "head_width": 8, "chunk": 4},
        "channel": {"kind": "cms", "levels": [{"period_tokens": 64, "expansion": 1.0}]},
    },
}


def run_config(data_config, *, kind="self_modifying", stream=None, evaluation=None):
    return parse_run(
        {
            "name": f"tiny-{kind.replace('_', '-')}",
            "output_dir": "unused",
            "seed": 3,
            "data": data_config.model_dump(mode="json"),
            "model": {"vocab_size": 300, "width": 16, "num_layers": 1, **MODELS[kind]},
            "train": {
                "budget_tokens": 1024,
                "context_length": CONTEXT,
                "batch_size": 4,
                "stream": stream or {"kind": "shuffled"},
                "optimizer": {"kind": "adamw", "rate": 1e-3},
                "schedule": {"kind": "cosine", "warmup_tokens": 0},
                "evaluate_every_tokens": 512,
                "evaluate_tokens": 128,
                "checkpoints": {"every_tokens": 512},
                "device": "cpu",
            },
            "eval": evaluation
            or {
                "batch_size": 4,
                "bootstrap_samples": 100,
                "passkey": {"lengths": [96, 128], "samples": 3},
                "sampling": {"prompts": ["the army"], "max_new_tokens": 6},
            },
        },
        "test",
    )


def save(run_dir, config, *, step=8, milestone=None, change=None, seed=3):
    """Write a checkpoint of a model that was never trained."""
    data = TokenDataset.open(Path(config.data.output_dir), "train")
    model = LanguageModel(config.model)
    model.initialise(seed)
    if change is not None:
        with torch.no_grad():
            change(model)
    identity = {
        "run_id": "r1",
        "name": config.name,
        "config_hash": config_hash(config),
        "data_hash": data.data_hash,
        "tokenizer_hash": data.tokenizer_hash,
        "commit": "abc",
        "seed": config.seed,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    write_checkpoint(
        folder,
        tensors={"model": model.state_dict()},
        documents={
            "config.json": config.model_dump(mode="json"),
            "run.json": identity,
            "train_state.json": {"step": step, "tokens": step * 64},
        },
        extra_files={"tokenizer.json": Path(config.data.output_dir) / "tokenizer.json"},
        config_hash=identity["config_hash"],
        milestone=milestone,
    )
    return folder


@pytest.fixture
def run_dir(tmp_path, data_config):
    save(tmp_path / "run", run_config(data_config))
    return tmp_path / "run"


def test_all_tasks_of_a_run(run_dir, data_config):
    lines = []
    paths = evaluate_run(run_dir, report=lines.append)
    assert [path.name for path in paths] == ["language_modelling.json", "passkey.json", "sampling.json"]
    written = [line for line in lines if not line.startswith(" ")]
    assert [line.split(":")[0] for line in written] == ["language_modelling", "passkey", "sampling"]
    assert re.match(r"  window: [\d.]+ \[[\d.]+, [\d.]+\] bits per byte of the test split", lines[0])
    assert any(re.match(r"  96 tokens: found 0.00 \[0.00, ", line) for line in lines)
    scored, passkey, text = (load_result(path).metrics for path in paths)
    identity = load_result(paths[0]).identity
    assert (identity.tokens, identity.step, identity.arm) == (512, 8, "self_modifying+cms")

    documents = scored.documents
    expected = BITS * sum(documents.window_nats) / sum(documents.bytes)
    assert scored.window.bits_per_byte.value == pytest.approx(expected, rel=1e-12)
    assert scored.window.bits_per_byte.low < expected < scored.window.bits_per_byte.high
    gap = BITS * (sum(documents.bigram_nats) - sum(documents.window_nats)) / sum(documents.bytes)
    assert scored.window.below_bigram.value == pytest.approx(gap, rel=1e-9)
    assert scored.bigram.bits_per_byte.value < scored.unigram.bits_per_byte.value
    assert scored.streaming is not None
    assert sum(period.documents for period in scored.window.by_period) == len(documents.id)
    for index, period in enumerate(scored.window.by_period):
        here = [i for i, p in enumerate(documents.period) if p == index]
        assert period.documents == len(here)
        if here:
            nats, size = (sum(column[i] for i in here) for column in (documents.window_nats, documents.bytes))
            assert period.bits_per_byte.value == pytest.approx(BITS * nats / size, rel=1e-9)
        else:
            assert period.bits_per_byte is None

    assert [length.length for length in passkey.lengths] == [96, 128]
    assert passkey.reading == "segments"
    assert text.samples[0].prompt == "the army"


def test_a_second_run_does_nothing(run_dir):
    paths = evaluate_run(run_dir, report=lambda line: None)
    before = [path.stat().st_mtime_ns for path in paths]
    lines = []
    assert evaluate_run(run_dir, report=lines.append) == paths
    assert [path.stat().st_mtime_ns for path in paths] == before
    assert all("kept" in line for line in lines if not line.startswith(" "))


def test_settings_of_the_call_replace_those_of_the_run(run_dir):
    settings = EvalConfig.model_validate({"language_modelling": None, "passkey": {"lengths": [96], "samples": 2}})
    (path,) = evaluate_run(run_dir, settings=settings, report=lambda line: None)
    result = load_result(path)
    assert (path.name, result.settings["lengths"], result.settings["samples"]) == ("passkey.json", [96], 2)
    assert result.identity.commit == "abc"  # trained
    assert result.scored_commit == current_commit()
    with pytest.raises(ConfigError, match="'sampling' is not part of run"):
        evaluate_run(run_dir, ("sampling",), settings=settings, report=lambda line: None)


def test_a_new_checkpoint_is_measured_and_an_edited_result_is_measured_again(run_dir, data_config):
    (path,) = evaluate_run(run_dir, ("sampling",), report=lambda line: None)
    save(run_dir, run_config(data_config), step=9)
    evaluate_run(run_dir, ("sampling",), report=lambda line: None)
    assert load_result(path).checkpoint.name == "step-00000009"
    document = json.loads(path.read_text())
    document["metrics"]["samples"][0]["text"] = "better text"
    path.write_text(json.dumps(document))
    lines = []
    evaluate_run(run_dir, ("sampling",), report=lines.append)
    assert "was changed after it was written" in lines[0]
    assert load_result(path).metrics.samples[0].text != "better text"


def test_evaluating_twice_gives_the_same_numbers(run_dir):
    def numbers():
        return [load_result(path).metrics.model_dump_json() for path in paths]

    def without_speed(text):
        return json.loads(text, object_hook=lambda d: {k: v for k, v in d.items() if k != "tokens_per_s"})

    paths = evaluate_run(run_dir, report=lambda line: None)
    first = numbers()
    shutil.rmtree(run_dir / "results")
    evaluate_run(run_dir, report=lambda line: None)
    assert [without_speed(text) for text in numbers()] == [without_speed(text) for text in first]


def test_an_attention_model_is_not_streamed(tmp_path, data_config, run_dir):
    save(tmp_path / "attention", run_config(data_config, kind="attention"))
    paths = evaluate_run(tmp_path / "attention", report=lambda line: None)
    scored, passkey, _ = (load_result(path) for path in paths)
    assert scored.metrics.streaming is None
    assert passkey.metrics.reading == "segments"
    other = load_result(evaluate_run(run_dir, ("language_modelling",), report=lambda line: None)[0])
    difference = paired_difference(scored, other, bootstrap=Bootstrap(samples=100))
    values = [result.metrics.window.bits_per_byte.value for result in (scored, other)]
    assert difference.value == pytest.approx(values[0] - values[1], rel=1e-9)
    assert comparable(scored, scored)


def test_passkey_gives_every_model_the_same_samples(tmp_path, data_config, run_dir):
    save(tmp_path / "attention", run_config(data_config, kind="attention"))
    samples = []
    for folder in (run_dir, tmp_path / "attention"):
        (path,) = evaluate_run(folder, ("passkey",), report=lambda line: None)
        lengths = load_result(path).metrics.lengths
        samples.append([(s.depth, s.answer_tokens) for length in lengths for s in length.samples])
    assert samples[0] == samples[1]


@pytest.fixture
def chronological(tmp_path, data_config):
    config = run_config(data_config, stream={"kind": "chronological", "periods": 2})
    for period in range(3):
        save(tmp_path / "run", config, step=8 * period, milestone=f"period-{period}", seed=period)
    save(tmp_path / "run", config, step=17)
    return tmp_path / "run"


def test_a_chronological_run_is_scored_at_every_border(chronological):
    (path,) = evaluate_run(chronological, ("continual",), report=lambda line: None)
    metrics = load_result(path).metrics
    assert [len(metrics.bits_per_byte), len(metrics.bits_per_byte[0])] == [3, 2]
    assert [segment.trained_tokens for segment in metrics.segments] == [512, 1024]
    matrix = [[cell.value for cell in row] for row in metrics.bits_per_byte]
    assert metrics.backward_transfer.value == pytest.approx(matrix[1][0] - matrix[2][0], rel=1e-9)
    assert metrics.forward_transfer.value == pytest.approx(matrix[0][1] - matrix[1][1], rel=1e-9)
    assert [path] == evaluate_run(chronological, ("continual",), report=lambda line: None)


def test_a_lost_border_is_named(chronological):
    shutil.rmtree(chronological / "checkpoints" / "step-00000008")
    with pytest.raises(CheckpointError, match=r"border checkpoints period-1 are missing"):
        evaluate_run(chronological, ("continual",), report=lambda line: None)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (
            ("telepathy",),
            r"unknown task 'telepathy'; choices: language_modelling, passkey, sampling, continual",
        ),
        (
            ("continual",),
            r"'continual' is not part of run .*not chronological; its tasks: language_modelling",
        ),
    ],
)
def test_tasks_that_cannot_run_are_refused(run_dir, tasks, message):
    with pytest.raises(ConfigError, match=message):
        evaluate_run(run_dir, tasks, report=lambda line: None)


def test_a_task_set_to_null_is_refused(tmp_path, data_config):
    save(tmp_path, run_config(data_config, evaluation={"language_modelling": None}))
    assert evaluate_run(tmp_path, report=lambda line: None) == []
    with pytest.raises(ConfigError, match=r"eval\.passkey is null; its tasks: none"):
        evaluate_run(tmp_path, ("passkey",), report=lambda line: None)


def test_a_run_without_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="with a valid one below checkpoints/"):
        evaluate_run(tmp_path, report=lambda line: None)


def test_a_damaged_newest_checkpoint_is_skipped_and_named(run_dir, data_config):
    damaged = save(run_dir, run_config(data_config), step=9)
    (damaged / "model.safetensors").write_bytes(b"short")
    lines = []
    (path,) = evaluate_run(run_dir, ("sampling",), report=lines.append)
    assert "step-00000009" in lines[0]
    assert load_result(path).checkpoint.name == "step-00000008"


@pytest.mark.parametrize("task", ["language_modelling", "passkey", "sampling"])
def test_a_diverged_model_writes_no_result(tmp_path, data_config, task):
    save(tmp_path, run_config(data_config), change=lambda model: model.norm.weight.fill_(float("nan")))
    with pytest.raises(NumericsError, match=rf"{task} on .*step-00000008.*not finite"):
        evaluate_run(tmp_path, (task,), report=lambda line: None)
    assert not list(tmp_path.glob("results/*"))


@pytest.mark.parametrize(
    ("field", "error", "message"),
    [
        ("tokenizer_hash", CheckpointError, "trained with tokenizer"),
        ("data_hash", DataError, "the run was trained on"),
    ],
)
def test_another_data_set_is_refused(run_dir, monkeypatch, field, error, message):
    monkeypatch.setattr(TokenDataset, field, "f" * 64, raising=False)
    opened = TokenDataset.open

    def other(folder, split, **options):
        dataset = opened(folder, split, **options)
        object.__setattr__(dataset, field, "f" * 64)
        return dataset

    monkeypatch.setattr(TokenDataset, "open", other)
    with pytest.raises(error, match=message):
        evaluate_run(run_dir, ("language_modelling",), report=lambda line: None)
