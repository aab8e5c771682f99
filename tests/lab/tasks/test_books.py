"""Loss by position in long books."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from nested_lm.checkpoint import MANIFEST, LoadedCheckpoint
from nested_lm.config.load import load_run
from nested_lm.data.document import Document
from nested_lm.data.tokenizer import TextTokenizer
from nested_lm.errors import ConfigError, DataError, NumericsError
from nested_lm.nn.model import token_losses
from nested_lm_lab.evaluation.bootstrap import Bootstrap
from nested_lm_lab.evaluation.options import read_settings
from nested_lm_lab.evaluation.publish import publish
from nested_lm_lab.evaluation.results import load_result
from nested_lm_lab.evaluation.subject import Subject
from nested_lm_lab.tasks.books import BooksSettings, BooksTask, measure_books, open_books
from nested_lm_lab.tasks.needles.metrics import BooksMetrics
from nested_lm_lab.tasks.needles.stops import may_go_further

LENGTH = 300
BOOTSTRAP = Bootstrap(samples=100)


@pytest.fixture(scope="module")
def tokenizer(data_config):
    return TextTokenizer.load(Path(data_config.output_dir) / "tokenizer.json")


@pytest.fixture
def load(tokenizer):
    identity = {"run_id": "r", "name": "n", "config_hash": "c", "data_hash": "d", "tokenizer_hash": tokenizer.hash}
    identity |= {"commit": None, "seed": 1, "parameters": 1}
    config = load_run("hope/demo", ["train.context_length=64", "train.batch_size=32"])
    return lambda model: LoadedCheckpoint(model, config, tokenizer, identity, 1, 1, None)


@pytest.fixture
def files(tmp_path):
    paths = []
    for name in ("one", "two", "three"):
        paths.append(tmp_path / f"{name}.txt")
        paths[-1].write_text(f"The union of {name} shall keep its army and navy in peace. " * 40)
    return paths


def evaluate(loaded, checkpoint, files, *, output, report, **settings):
    subject = Subject(checkpoint, None, None, loaded, loaded.config.eval, report)
    return publish(BooksTask(BooksSettings(files=tuple(files), **settings)), subject, output=output)


@pytest.mark.parametrize("kind", ["self_modifying", "attention"])
def test_positions_are_those_of_reading_each_book_alone(kind, make_model, load, tokenizer, files):
    model = make_model(kind)
    books = open_books(tokenizer, files, length=LENGTH, books=1)
    found = measure_books(load(model), books, batch_rows=2, max_state_mib=64, bootstrap=BOOTSTRAP)
    inputs = torch.from_numpy(np.concatenate([np.full((3, 1), tokenizer.start_of_text), books[:, :-1]], axis=1))
    with torch.no_grad():
        alone = token_losses(model(inputs).logits, torch.from_numpy(books)).double().numpy()
        first = token_losses(model(inputs[:, :64]).logits, torch.from_numpy(books[:, :64])).double().numpy()
    assert found.carried.value == pytest.approx(alone.mean(), rel=1e-5)
    assert found.perplexity.value == pytest.approx(math.exp(alone.mean()), rel=1e-4)
    assert [(p.first, p.last) for p in found.positions][:3] == [(0, 3), (4, 7), (8, 15)]
    assert found.positions[-1].last == LENGTH - 1
    for position in found.positions:
        part = slice(position.first, position.last + 1)
        assert position.carried.value == pytest.approx(alone[:, part].mean(), rel=1e-4)
        assert position.carried.n == 3
        if position.last < 64:  # within the first training context both are the same
            assert position.fresh.value == pytest.approx(first[:, part].mean(), rel=1e-4)
            assert position.saved.value == pytest.approx(0.0, abs=1e-4)
    assert found.saved.value == pytest.approx(found.fresh.value - found.carried.value, abs=1e-9)
    assert (found.reached, found.stopped) == (LENGTH, None)


def test_a_growing_state_stops_at_the_limit_and_keeps_what_was_read(make_model, load, tokenizer, tmp_path):
    book = tmp_path / "long.txt"
    book.write_text("The union of these states shall keep its army. " * 1200)
    books = open_books(tokenizer, [book], length=12_000, books=1)
    found = measure_books(load(make_model("attention")), books, batch_rows=1, max_state_mib=1, bootstrap=BOOTSTRAP)
    assert found.reached < 12_000
    assert found.stopped == f"after {found.reached:,} tokens: the states take 1 MiB, the limit is 1 MiB"
    assert found.positions[-1].last == found.reached - 1


def test_a_result_that_stopped_is_kept_until_the_limit_is_raised(make_model, load, tmp_path):
    checkpoint = tmp_path / "checkpoints" / "step-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / MANIFEST).write_text("{}")
    book, output = tmp_path / "long.txt", tmp_path / "books.json"
    book.write_text("The union of these states shall keep its army. " * 1200)
    loaded, lines = load(make_model("attention")), []
    options = {"length": 12_000, "batch_rows": 1, "output": output, "report": lines.append}
    evaluate(loaded, checkpoint, [book], max_state_mib=1, **options)
    first = load_result(output)
    assert (first.metrics.stopped is None, first.metrics.max_state_mib) == (False, 1)
    evaluate(loaded, checkpoint, [book], max_state_mib=1, **options)
    assert any("kept" in line for line in lines[-3:])
    assert load_result(output) == first
    # What was written before the limit was kept does not say that it was high enough.
    document = first.model_dump(mode="json")
    del document["metrics"]["max_state_mib"]
    old = BooksMetrics.model_validate_json(json.dumps(document["metrics"]))
    assert may_go_further(old, 1)
    evaluate(loaded, checkpoint, [book], max_state_mib=64, **options)
    assert load_result(output).metrics.reached == 12_000
    assert not may_go_further(load_result(output).metrics, 128)


def test_the_shipped_corpus_is_cut_into_stretches_none_twice(tokenizer, monkeypatch):
    books = open_books(tokenizer, [], length=500, books=3)
    assert books.shape == (3, 500)
    assert len({row.tobytes() for row in books}) == 3
    assert open_books(tokenizer, [], length=1000, books=1)[0, :500].tolist() == books[0].tolist()
    monkeypatch.setattr(
        "nested_lm_lab.tasks.books.read_documents", lambda corpus: [Document("d", "peace " * 50, None, "d")]
    )
    with pytest.raises(DataError, match="never repeated"):
        open_books(tokenizer, [], length=500, books=3)


def test_what_cannot_be_measured_is_refused_and_nothing_is_written(make_model, load, tokenizer, files, tmp_path):
    checkpoint = tmp_path / "checkpoints" / "step-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / MANIFEST).write_text("{}")
    output = tmp_path / "results" / "books.json"
    options = {"batch_rows": 3, "max_state_mib": 64, "output": output}
    loaded = load(make_model("self_modifying"))
    with pytest.raises(DataError, match=r"one.txt has .* --length asks for 100,000"):
        evaluate(loaded, checkpoint, files, length=100_000, report=print, **options)
    with pytest.raises(ConfigError, match="--length: Input should be greater than or equal to 2"):
        read_settings(BooksSettings, {"length": "1"})
    with pytest.raises(ConfigError, match="leave it out, or the files"):
        read_settings(BooksSettings, {"files": files, "count": 3})
    with torch.no_grad():
        loaded.model.embedding.weight.fill_(float("nan"))
    with pytest.raises(NumericsError, match=r"books on .*: predictions are not finite"):
        evaluate(loaded, checkpoint, files, length=100, report=print, **options)
    assert not output.exists()


def test_a_result_is_whole_and_kept(make_model, load, files, tmp_path):
    checkpoint = tmp_path / "checkpoints" / "step-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / MANIFEST).write_text("{}")
    lines = []
    options = {"batch_rows": 3, "max_state_mib": 64, "output": tmp_path / "books.json"}
    for _ in range(2):
        evaluate(load(make_model("attention")), checkpoint, files, length=200, report=lines.append, **options)
    result = load_result(tmp_path / "books.json")
    assert result.metrics.books == 3
    assert result.settings["books"] == ["one.txt", "two.txt", "three.txt"]
    assert "kept" in lines[-2]
    assert " nats a token, perplexity " in lines[-1]
