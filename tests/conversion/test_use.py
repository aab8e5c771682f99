"""What a converted model is for: text from it, evaluation, and training that goes on from it."""

import json
import math

import pytest
from typer.testing import CliRunner

from nested_lm.checkpoint import find_checkpoint, load_model, read_tensors
from nested_lm.cli.main import app
from tests.conftest import write_tiny_documents

TRAINING = [
    "train.accumulation=1",
    "train.budget_tokens=256",
    "train.schedule.warmup_tokens=64",
    "train.evaluate_every_tokens=256",
    "train.evaluate_tokens=64",
    "train.checkpoints.every_tokens=256",
    "train.device=cpu",
    "eval.passkey=null",
    "eval.language_modelling.max_documents=3",
    "eval.sampling.max_new_tokens=4",
]


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    return invoke


def test_convert_data_generate_eval_train(make_llama, run, tmp_path):
    _, folder = make_llama()
    write_tiny_documents(tmp_path / "texts.jsonl", count=40)
    (tmp_path / "texts.yaml").write_text(
        "name: texts\noutput_dir: built\nsource: {kind: folder, path: texts.jsonl, date_field: date}\n"
        "tokenizer: {kind: byte_bpe, vocab_size: 300}\nsplit: {train: 0.6, validation: 0.2, test: 0.2}\n"
    )
    said = run("convert", folder, "new/model", "--levels", "64,128", "--data", "texts.yaml", *TRAINING)
    assert "level 0, updated every 64 training tokens: MLPs of layers 0, 1\n" in said
    assert "level 1, updated every 128 training tokens: MLPs of layers 2, 3\n" in said
    assert "finished" in run("data", "new/model/data.yaml")
    assert run("generate", "new/model", "--prompt", "a text", "--device", "cpu").startswith("a text")

    run("eval", "new/model")
    score = json.loads((tmp_path / "new/model/results/language_modelling.json").read_text())
    assert math.isfinite(score["metrics"]["window"]["bits_per_byte"]["value"])
    built = json.loads((tmp_path / "new/model/data/manifest.json").read_text())
    assert (built["tokenizer"]["start"], built["tokenizer"]["end"]) == (300, 301)

    going_on = ("train", "new/model/config.resolved.yaml", "--init-from", "new/model")
    assert "weights      those of new/model\n" in run(*going_on, "--dry-run")
    run(*going_on)
    trained = load_model(find_checkpoint(tmp_path / "new/model-trained"), device="cpu")
    assert (trained.step, trained.identity["data_hash"]) == (4, score["identity"]["data_hash"])
    before = read_tensors(find_checkpoint(tmp_path / "new/model"), "model")
    after = read_tensors(find_checkpoint(tmp_path / "new/model-trained"), "model")
    assert set(before) == set(after)
    moved = (after["blocks.3.channel.mlp.out.weight"] - before["blocks.3.channel.mlp.out.weight"]).abs().max()
    assert 0 < moved < 1e-3  # a few small steps from the given weights, not from drawn ones
    run("eval", "new/model-trained", "--tasks", "language_modelling")
