"""Zero-shot tasks above the scorer: data folders, hashes, stock task files, result files and their comparison."""

import gzip
import json
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nested_lm.checkpoint import MANIFEST as CHECKPOINT_MANIFEST
from nested_lm.checkpoint import LoadedCheckpoint
from nested_lm.config.load import load_run
from nested_lm.data.tokenizer import TextTokenizer
from nested_lm.errors import ConfigError, DataError, NumericsError, ReportError
from nested_lm_lab.evaluation.publish import publish
from nested_lm_lab.evaluation.results import load_result
from nested_lm_lab.evaluation.subject import Subject
from nested_lm_lab.tasks.zeroshot import tasks
from nested_lm_lab.tasks.zeroshot.compare import compare, comparison_lines
from nested_lm_lab.tasks.zeroshot.data_folder import (
    MANIFEST,
    _hellaswag_cleaning,
    digest_of_documents,
    make_data_folder,
    read_manifest,
    verified_files,
)
from nested_lm_lab.tasks.zeroshot.harness import check_task_files, hash_of_files, require_harness
from nested_lm_lab.tasks.zeroshot.settings import Memorize, ZeroShotSettings
from nested_lm_lab.tasks.zeroshot.task import ZeroShotSuite
from tests.lab.tasks.zeroshot_oracle import log_likelihood, rolling_log_likelihood

pytest.importorskip("lm_eval")

NAMES = ("wikitext", "lambada_openai", "piqa", "boolq")
ROWS = {
    "wikitext": [{"page": "the union of states shall keep its army and navy"}, {"page": "in peace the states"}],
    "lambada_openai": [{"text": "the army and the navy"}, {"text": "keep the peace of the union"}],
    "piqa": [
        {"goal": "keep peace", "sol1": "shall keep the union", "sol2": "the navy", "label": 0},
        {"goal": "the army", "sol1": "in", "sol2": "its states", "label": 1},
        {"goal": "its navy", "sol1": "of peace", "sol2": "and the army", "label": 1},
    ],
    "boolq": [
        {"question": "is the union in peace", "passage": "the union shall keep its peace", "label": 1, "idx": 7},
        {"question": "is the army a navy", "passage": "the army and the navy of the states", "label": 0, "idx": 8},
    ],
}

HELLASWAG = [
    {
        "ind": 3,
        "activity_label": "Sailing",
        "ctx_a": "The navy [title] sails.",
        "ctx_b": "it",
        "ctx": "The navy [title] sails. it",
        "endings": ["keeps the peace [substeps] of the union.", "is an army.", "in the states", "shall"],
        "source_id": "x",
        "split": "val",
        "split_type": "indomain",
        "label": "0",
    }
]
"""As published: the harness makes query and choices of it."""

LINES = "".join(json.dumps(row | {"idx": number}) + "\n" for number in range(99) for row in ROWS["boolq"])
PACKED = gzip.compress(LINES.encode(), mtime=0)


def write_rows(folder, rows=ROWS):
    """Published files: plain JSON lines, one a task."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, found in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return folder


@pytest.fixture
def folder(tmp_path):
    """A data folder of four tasks."""
    make_data_folder(tmp_path / "data", NAMES, source=write_rows(tmp_path / "published"), report=lambda line: None)
    return tmp_path / "data"


@pytest.fixture
def offline(monkeypatch):
    """A machine without a network: whoever asks for one fails."""

    def refuse(*_, **__):
        raise AssertionError("the network was asked for something")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def tokenizer(data_config):
    return TextTokenizer.load(Path(data_config.output_dir) / "tokenizer.json")


@pytest.fixture
def measure(tokenizer, make_model, data_config, folder, tmp_path):
    """Score a small model on the folder; returns the path of the result, and what was said in `measure.said`."""

    def run(kind="self_modifying", *, name="tiny", change=None, label=None, data_dir=folder, text=None, **settings):
        checkpoint = tmp_path / name / "checkpoints" / "step-00000004"
        checkpoint.mkdir(parents=True, exist_ok=True)
        (checkpoint / CHECKPOINT_MANIFEST).write_text("{}")
        identity = {
            "run_id": f"{name}-1",
            "name": name,
            "config_hash": "c" * 16,
            "data_hash": None,
            "tokenizer_hash": tokenizer.hash,
            "commit": "abc",
            "seed": 1,
            "parameters": 1000,
        }
        config = load_run("hope/demo", [f"data.output_dir={text or data_config.output_dir}"])
        model = make_model(kind)
        if change is not None:
            change(model)
        loaded = LoadedCheckpoint(model, config, tokenizer, identity, 4, 4096, None)
        fields = {"tasks": NAMES, "bootstrap_samples": 100, "batch_rows": 4, "max_length": 64}
        run.said = []
        subject = Subject(checkpoint, checkpoint.parent.parent, None, loaded, config.eval, run.said.append)
        task = ZeroShotSuite(ZeroShotSettings(**(fields | settings), data_dir=data_dir))
        return publish(task, subject, output=tmp_path / name / "results" / "zeroshot.json", label=label)

    return run


def results(root):
    return sorted(path.name for path in root.rglob("results/*"))


@pytest.mark.usefixtures("offline")
def test_a_folder_is_enough_and_scores_are_those_of_one_sequence_at_a_time(measure, make_model, tokenizer):
    result = load_result(measure())
    model, scores = make_model("self_modifying"), {entry.task: entry for entry in result.metrics.arms[0].tasks}
    assert list(scores) == list(NAMES) == list(result.metrics.data)
    for row, nats, right in zip(
        ROWS["lambada_openai"],
        scores["lambada_openai"].values["nats"],
        scores["lambada_openai"].values["acc"],
        strict=True,
    ):
        context, word = row["text"].rsplit(" ", 1)
        expected, first = log_likelihood(model, tokenizer, context, " " + word)
        assert nats == pytest.approx(-expected, abs=1e-3)
        assert right == first
    for row, nats in zip(ROWS["wikitext"], scores["wikitext"].values["nats"], strict=True):
        assert nats == pytest.approx(-rolling_log_likelihood(model, tokenizer, row["page"], 64), abs=1e-3)
    for row, right in zip(ROWS["piqa"], scores["piqa"].values["acc"], strict=True):
        prompt = f"Question: {row['goal']}\nAnswer:"
        both = [log_likelihood(model, tokenizer, prompt, f" {row[name]}")[0] for name in ("sol1", "sol2")]
        assert right == (both.index(max(both)) == row["label"])
    floors = result.metrics.floors
    assert (floors["piqa"].chance, floors["piqa"].constant) == (0.5, pytest.approx(2 / 3))
    assert floors["boolq"].constant == 0.5
    assert floors["wikitext"].bigram["bits_per_byte"] > 0
    assert scores["piqa"].standard_errors["acc"] is not None
    assert result.metrics.data["piqa"].published == 1838
    assert result.metrics.data["piqa"].source == "data folder, from piqa.jsonl"


def test_a_result_of_the_same_checkpoint_is_kept_and_another_runs_is_never_replaced(measure, tmp_path):
    path = measure(tasks=("piqa",))
    before = path.read_bytes()
    assert measure(tasks=("piqa",)) == path
    assert path.read_bytes() == before
    assert any("kept" in line for line in measure.said)
    other = tmp_path / "other" / "results"
    other.mkdir(parents=True)
    (other / "zeroshot.json").write_bytes(before)
    with pytest.raises(ConfigError, match="holds the scores of run tiny-1, this is other-1"):
        measure(tasks=("piqa",), name="other")
    assert (other / "zeroshot.json").read_bytes() == before


def test_labels_keep_results_apart(measure, tmp_path):
    subject, task = SimpleNamespace(identity=SimpleNamespace(name="hope")), ZeroShotSuite(ZeroShotSettings())
    assert task.place(subject, "zeroshot") == Path("eval/zeroshot_hope.json")
    assert task.place(subject, "zeroshot_memorize") == Path("eval/zeroshot_hope_memorize.json")
    with pytest.raises(ConfigError, match="small letters and digits only"):
        measure(tasks=("piqa",), label="a/b")
    path = measure(tasks=("piqa",))
    assert load_result(measure(tasks=("piqa",), label="again")).task == "zeroshot_again"
    assert measure.said[0] == f"measured again: {path} is of another task, and will be replaced"


@pytest.mark.usefixtures("offline")
def test_the_hub_gives_the_same_scores_as_a_folder_made_from_it(measure, monkeypatch, tmp_path):
    import datasets

    published = {task.dataset: (task, ROWS.get(name, HELLASWAG)) for name, task in tasks.TASKS.items()}

    read_files = datasets.load_dataset

    def load_dataset(path, name=None, split=None, **others):
        if path == "json":
            return read_files(path, name, split=split, **others)
        task, rows = published[path]
        assert name == task.subset
        found = datasets.DatasetDict({part: datasets.Dataset.from_list(rows) for part in ("train", task.split)})
        return found if split is None else found[split]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    chosen = ("wikitext", "piqa", "hellaswag", "boolq")
    hub = load_result(measure(name="hub", tasks=chosen, data_dir=None))
    made = make_data_folder(tmp_path / "made", chosen, source=None, report=lambda line: None).parent
    folder = load_result(measure(name="folder", tasks=chosen, data_dir=made))
    assert hub.metrics.data["piqa"].source == "hub baber/piqa"
    assert hub.metrics.data["piqa"].file is None
    assert folder.metrics.data["boolq"].source == "data folder, from hub aps/super_glue boolq validation"
    assert hub.settings["documents"] == folder.settings["documents"]
    for one, other in zip(hub.metrics.arms[0].tasks, folder.metrics.arms[0].tasks, strict=True):
        assert (one.task, one.values) == (other.task, other.values)


def test_a_training_text_that_is_missing_is_found_out_before_anything_is_read(measure, monkeypatch, tmp_path):
    monkeypatch.setattr("nested_lm_lab.tasks.zeroshot.task._encode", None)
    with pytest.raises(
        DataError, match=r"nowhere holds no finished data set(?s:.*)leave this floor out with --no-bigram"
    ):
        measure(tasks=("piqa",), text=tmp_path / "nowhere")
    assert results(tmp_path) == []
    monkeypatch.undo()
    result = load_result(measure(tasks=("piqa",), text=tmp_path / "nowhere", bigram_tokens=None))
    assert (result.metrics.bigram_tokens, result.metrics.floors["piqa"].bigram) == (None, None)


def test_the_terminal_shows_standard_errors_and_copies_that_are_not_known(measure, monkeypatch, folder):
    known = digest_of_documents(tasks.TASKS["boolq"], ROWS["boolq"])
    monkeypatch.setitem(tasks.TASKS, "boolq", replace(tasks.TASKS["boolq"], known_copy=known))
    result = load_result(measure(tasks=("piqa", "boolq")))
    assert [result.metrics.data[name].known_copy for name in ("piqa", "boolq")] == [False, True]
    assert "not a known copy of the documents: piqa" in measure.said
    (errors,) = (line.split() for line in measure.said if line.startswith("  std. error"))
    assert errors[2:] == [f"{100 * entry.standard_errors['acc']:.2f}" for entry in result.metrics.arms[0].tasks]


def test_copies_are_known_by_the_fields_their_task_uses_and_by_their_order(monkeypatch, tmp_path):
    task = tasks.TASKS["boolq"]
    turned = [dict(reversed(row.items())) | {"idx": 0} for row in ROWS["boolq"]]
    known = digest_of_documents(task, ROWS["boolq"])
    assert known.startswith("20ceb9de2fd78ab1")  # another way to digest would know no copy
    assert digest_of_documents(task, turned) == known
    assert digest_of_documents(task, reversed(turned)) != known
    monkeypatch.setitem(tasks.TASKS, "boolq", replace(task, known_copy=known))
    lines = []
    make_data_folder(tmp_path / "data", ("boolq", "piqa"), source=write_rows(tmp_path / "rows"), report=lines.append)
    assert ["not a known copy" in line for line in lines] == [False, True]


def test_a_changed_task_file_is_refused_and_nothing_is_written(measure, monkeypatch, tmp_path):
    root, task = require_harness(), tasks.TASKS["piqa"]
    assert hash_of_files(root, task.files) == task.sha256
    copy = tmp_path / "tasks"
    for name in task.files:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text((root / name).read_text().replace("Question:", "Q:"))
    with pytest.raises(DataError, match=r"piqa\.yaml changed\n  expected sha256 936bc15b.*, found (?!936bc15b)"):
        check_task_files(copy, task)
    monkeypatch.setattr("nested_lm_lab.tasks.zeroshot.harness.require_harness", lambda: copy)
    with pytest.raises(DataError, match="Install the harness again"):
        measure(tasks=("piqa",))
    (copy / task.files[0]).unlink()
    with pytest.raises(DataError, match="cannot be read: No such file"):
        measure(tasks=("piqa",))
    assert results(tmp_path) == []


def test_a_changed_document_is_refused_and_nothing_is_written(measure, folder, tmp_path):
    path = folder / "piqa.jsonl.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()).replace(b'"label": 0', b'"label": 1'), mtime=0))
    with pytest.raises(DataError, match=r"piqa\.jsonl\.gz does not match its manifest"):
        measure(tasks=("piqa",))
    assert results(tmp_path) == []
    assert verified_files(folder, ("boolq",))  # the others are still good


def test_scores_that_are_not_finite_are_refused_and_nothing_is_written(measure, tmp_path):
    def poison(model):
        with torch.no_grad():
            model.embedding.weight[5:] = float("nan")

    with pytest.raises(NumericsError, match=r"zeroshot on .*step-00000004"):
        measure(tasks=("piqa",), change=poison)
    assert results(tmp_path) == []


def test_a_model_without_a_memory_cannot_memorise(measure, tmp_path):
    with pytest.raises(ConfigError, match="only fills a cache; leave --memorize out"):
        measure("attention", tasks=("piqa",), memorize=(Memorize(passes=1),))
    assert results(tmp_path) == []


def test_a_gain_is_of_a_document_and_in_its_nats_where_perplexity_counts(measure):
    """WikiText, the one task whose documents have sizes, has no question and so no gain."""
    result = load_result(measure(tasks=("wikitext", "lambada_openai"), memorize=(Memorize(passes=1),)))
    plain, memorized = (arm.tasks[-1] for arm in result.metrics.arms)
    assert [entry.task for entry in result.metrics.arms[1].tasks] == ["lambada_openai"]
    saved = [before - after for before, after in zip(plain.values["nats"], memorized.values["nats"], strict=True)]
    assert memorized.gain.value == pytest.approx(sum(saved) / len(saved))
    assert any("perplexities in nats a document; !: its interval excludes zero" in line for line in measure.said)
    measure(tasks=("lambada_openai",), name="plain")
    assert not any("nats a document" in line for line in measure.said)


class TestComparison:
    @pytest.fixture
    def two(self, measure):
        """Hope with a memorize arm, and a Transformer without."""
        chosen = ("wikitext", "piqa")
        hope = measure(name="hope", tasks=chosen, memorize=(Memorize(passes=1),))
        return hope, measure("attention", name="transformer", tasks=chosen)

    def test_arms_are_compared_by_name_and_lone_ones_are_named(self, two):
        hope, transformer = map(load_result, two)
        found = compare(hope, transformer)
        assert {(entry.arm, entry.task, entry.metric) for entry in found} == {
            ("plain", "wikitext", "word_perplexity"),
            ("plain", "wikitext", "bits_per_byte"),
            ("plain", "piqa", "acc"),
        }
        back = compare(transformer, hope)
        for one, other in zip(found, back, strict=True):
            assert one.interval.value == pytest.approx(-other.interval.value)
        assert any(
            line == "only hope seed 1 has memorize x1: nothing to compare with"
            for line in comparison_lines(hope, transformer)
        )
        assert {entry.arm for entry in compare(hope, hope)} == {"plain", "memorize x1"}
        assert all(entry.interval.value == 0 and not entry.is_real for entry in compare(hope, hope))

    def test_the_verb_prints_differences_and_refuses_other_questions(self, two, measure):
        from typer.testing import CliRunner

        from nested_lm.cli.main import app

        shown = CliRunner().invoke(app, ["eval", "zeroshot-compare", *map(str, two)])
        assert shown.exit_code == 0, shown.output
        assert "hope seed 1 minus transformer seed 1" in shown.output
        fewer = measure(name="fewer", tasks=("wikitext", "piqa"), limit=1)
        refused = CliRunner().invoke(app, ["eval", "zeroshot-compare", str(two[0]), str(fewer)])
        assert refused.exit_code != 0
        with pytest.raises(ReportError, match=r"settings\.limit: None against 1"):
            compare(load_result(two[0]), load_result(fewer))

    def test_other_task_versions_do_not_compare(self, two):
        hope = load_result(two[0])
        with pytest.raises(ReportError, match="task_version: '1' against '2'"):
            compare(hope, hope.model_copy(update={"task_version": "2"}))


class TestDataFolder:
    def test_it_is_made_twice_with_the_same_bytes_and_grows_by_task(self, tmp_path):
        source, lines = write_rows(tmp_path / "published"), []
        for name in ("one", "two"):
            for task in ("piqa", "boolq"):
                make_data_folder(tmp_path / name, (task,), source=source, report=lines.append)
        one, two = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("one", "two"))
        assert one == two
        assert set(one) == {MANIFEST, "piqa.jsonl.gz", "boolq.jsonl.gz"}
        assert lines[0] == "piqa: 3 documents of the 1,838 published, not a known copy, licence AFL-3.0"
        assert list(read_manifest(tmp_path / "one").tasks) == ["piqa", "boolq"]

    def test_what_is_wrong_is_named_and_leaves_the_folder_as_it_was(self, folder, tmp_path):
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        short = write_rows(tmp_path / "short", {"piqa": [{"goal": "a", "sol1": "b", "label": 0}], "boolq": []})
        write_rows(short, {"hellaswag": [{"ctx_a": "a", "ctx_b": "b", "activity_label": "c", "label": "0"}]})
        for names, message in (
            (("hellaswag",), r"hellaswag\.jsonl, document 0 of task hellaswag has no field 'endings'"),
            (("piqa",), r"piqa\.jsonl, document 0 of task piqa has no field 'sol2'"),
            (("boolq",), "no document for task boolq"),
            (("openbookqa",), r"has no file for task openbookqa; looked for openbookqa\.jsonl\.gz"),
        ):
            with pytest.raises(DataError, match=message):
                make_data_folder(folder, names, source=short, report=lambda line: None)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("boolq.jsonl.gz", PACKED[:-20], "cannot be read: Compressed file ended.*\n  See that.* fetch it again"),
            ("boolq.jsonl.gz", PACKED[:10] + b"\xff" * 20, "cannot be read: Error -3 .*\n  See that"),
            ("boolq.json", b'{"data": [{"label": 1}]}', "found an object with the fields 'data' instead of a list"),
            ("boolq.json", b"7", "found int 7 instead of a list of documents\n  Write .* a line into a .jsonl file"),
            ("boolq.json", b'["the navy"]', "document 0: found str 'the navy'; a document is an object"),
            ("boolq.jsonl", b"[1, 2]\n", "document 0: found list .1, 2.; a document is an object"),
        ],
        ids=["cut", "garbled", "object", "number", "string", "list"],
    )
    def test_a_damaged_file_and_one_of_another_form_are_named(self, name, content, message, tmp_path):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name}.* ?{message}"):
            make_data_folder(tmp_path / "data", ("boolq",), source=tmp_path, report=print)
        assert not (tmp_path / "data").exists()

    def test_published_hellaswag_needs_the_release_of_the_harness_that_scores_it(self, monkeypatch, tmp_path):
        _hellaswag_cleaning.cache_clear()
        monkeypatch.setattr("nested_lm_lab.tasks.zeroshot.harness.importlib.metadata.version", lambda name: "0.4.99")
        with pytest.raises(ConfigError, match=r"lm-eval 0\.4\.99 is installed"):
            make_data_folder(
                tmp_path / "data", ("hellaswag",), source=write_rows(tmp_path, {"hellaswag": HELLASWAG}), report=print
            )

    def test_a_missing_task_and_a_damaged_manifest_are_named(self, folder):
        with pytest.raises(DataError, match=r"holds no documents for hellaswag; it has wikitext(?s:.*)zeroshot-data"):
            verified_files(folder, ("piqa", "hellaswag"))
        (folder / "piqa.jsonl.gz").unlink()
        with pytest.raises(DataError, match=r"piqa\.jsonl\.gz cannot be read"):
            verified_files(folder, ("piqa",))
        (folder / MANIFEST).write_text("{")
        with pytest.raises(DataError, match=r"MANIFEST\.json is damaged"):
            verified_files(folder, ("piqa",))
        (folder / MANIFEST).unlink()
        with pytest.raises(DataError, match="is no data folder"):
            verified_files(folder, ("piqa",))


def test_another_release_of_the_harness_is_refused(monkeypatch):
    monkeypatch.setattr("nested_lm_lab.tasks.zeroshot.harness.importlib.metadata.version", lambda name: "0.4.99")
    with pytest.raises(ConfigError, match=r"lm-eval 0\.4\.99 is installed, zero-shot tasks need 0\.4\.13"):
        require_harness()
