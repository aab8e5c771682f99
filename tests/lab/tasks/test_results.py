import json
from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from nested_lm.errors import DataError, NumericsError, ReportError
from nested_lm_lab.evaluation.interval import Interval
from nested_lm_lab.evaluation.results import (
    comparable,
    content_digest,
    differences,
    load_result,
    require_comparable,
    write_result,
)


@pytest.fixture
def written(tmp_path, make_result):
    path = tmp_path / "run" / "results" / "sampling.json"
    write_result(path, make_result())
    return path


def rewrite(path, change, *, digest=True):
    document = json.loads(path.read_text())
    change(document)
    if digest:
        document["digest"] = content_digest(document)
    path.write_text(json.dumps(document))


def test_a_written_result_is_read_back_whole(written, make_result):
    assert load_result(written) == make_result()
    assert [entry.name for entry in written.parent.iterdir()] == ["sampling.json"]


def test_formatting_is_not_content(written, make_result):
    written.write_text(json.dumps(json.loads(written.read_text()), indent=7, sort_keys=True))
    assert load_result(written) == make_result()


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["metrics"].update(tokens_per_s=99.0),
        lambda d: d["identity"].update(seed=1),
        lambda d: d.update(wall_seconds=float("nan")),
        lambda d: d.pop("digest"),
    ],
)
def test_a_result_edited_by_hand_is_refused(written, change):
    rewrite(written, change, digest=False)
    with pytest.raises(ReportError, match=r"sampling\.json was changed after it was written"):
        load_result(written)


def test_refusal_of_an_edit_shows_both_digests_and_the_way_out(written):
    (written.parent.parent / "checkpoints").mkdir()
    before = json.loads(written.read_text())["digest"]
    rewrite(written, lambda d: d["identity"].update(tokens=1), digest=False)
    now = content_digest(json.loads(written.read_text()))
    with pytest.raises(ReportError) as caught:
        load_result(written)
    assert before in str(caught.value)
    assert now in str(caught.value)
    assert f"`nested-lm eval {written.parent.parent}`" in str(caught.value)


@pytest.mark.parametrize(
    ("place", "task", "command"),
    [
        ("results/passkey.json", "passkey", "eval {run}"),
        ("results/continual.json", "continual", "eval {run}"),
        ("results/niah_long.json", "niah_long", "eval niah {run} --label long"),
        ("results/step-4/babilong.json", "babilong", "eval babilong {run}/checkpoints/step-4"),
        ("results/regret.json", "regret", "eval continual {run}"),
        ("results/class_incremental.json", "class_incremental", "eval continual {run}"),
        ("results/a.json", "zeroshot_memorize", "eval zeroshot {run} --label memorize --output {run}/results/a.json"),
        ("elsewhere/books.json", "books", "eval books RUN --output {run}/elsewhere/books.json"),
        ("elsewhere/lesion.json", "lesion", "eval continual RUN --output-dir {run}/elsewhere"),
    ],
)
def test_the_way_out_names_the_verb_that_measured(tmp_path, place, task, command):
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / place
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"schema_version": 1, "task": task, "digest": "0"}))
    with pytest.raises(ReportError) as caught:
        load_result(path)
    assert f"`nested-lm {command.format(run=tmp_path)}`" in str(caught.value)


def test_published_evidence_is_restored_and_not_measured_again(written):
    rewrite(written, lambda d: d.update(wall_seconds=9.0), digest=False)
    with pytest.raises(ReportError) as caught:
        load_result(written)
    assert "holds no checkpoints" in str(caught.value)
    assert f"`git checkout -- {written}`" in str(caught.value)
    assert "nested-lm eval" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(extra=1), r"extra: Extra inputs are not permitted \(found 1\)"),
        (lambda d: d["identity"].update(seed="0"), r"identity\.seed: .*valid integer \(found '0'\)"),
        (
            lambda d: d["metrics"].update(kind="telepathy"),
            r"metrics\.kind: found 'telepathy', allowed are language_",
        ),
        (lambda d: d.update(metrics=[1]), r"metrics\.kind: found None"),
        (lambda d: d["metrics"].update(kind=["sampling"]), r"metrics\.kind: found \['sampling'\]"),
        (lambda d: d["metrics"].update(samples=[3]), r"metrics\.samples\.0: .*should be an object"),
        (lambda d: d.update(task=5, identity=None), r"task: .*valid string[^$]*identity: "),
        (lambda d: d.update(task="passkey"), r"task is 'passkey' but the metrics are those of 'sampling'"),
        (lambda d: d.update(schema_version=2), r"schema_version is 2, this version reads 1"),
    ],
)
def test_a_result_that_does_not_fit_the_schema_is_refused(written, change, message):
    rewrite(written, change)
    with pytest.raises(ReportError, match=message):
        load_result(written)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such result file"),
        ("{", "not a JSON file"),
        ("[]", "expected a JSON object, found list"),
        ("[" * 100_000, "not a JSON file"),
        (f'{{"seed": {"9" * 5000}}}', "not a JSON file"),
        ('{"schema_version": 1, "task": "\\ud800"}', "holds half a character"),
        ('{"schema_version": 1, "task": ["niah"], "metrics": 7}', "was changed after it was written"),
    ],
)
def test_files_that_are_no_results_are_refused(written, text, message):
    written.unlink() if text is None else written.write_text(text)
    with pytest.raises(ReportError, match=message):
        load_result(written)


def test_numbers_must_be_finite():
    with pytest.raises(NumericsError, match="not finite"):
        content_digest({"a": float("inf")})
    with pytest.raises(ValidationError, match="finite number"):
        Interval(value=float("nan"), low=0.0, high=1.0, n=3, method="m")


@pytest.mark.parametrize(("low", "high"), [(2.0, 1.0), (None, 1.0), (1.0, None)])
def test_intervals_are_ordered_and_whole(low, high):
    with pytest.raises(ValidationError):
        Interval(value=1.5, low=low, high=high, n=3, method="m")


def test_a_failed_write_leaves_the_old_file_and_no_other(written, make_result, monkeypatch):
    before = written.read_bytes()

    def no_space(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nested_lm.storage.atomic.os.fsync", no_space)
    with pytest.raises(DataError, match="no space left"):
        write_result(written, make_result(seed=5))
    assert written.read_bytes() == before
    assert [entry.name for entry in written.parent.iterdir()] == ["sampling.json"]


@pytest.mark.parametrize(
    "other",
    [
        {"config_hash": "x", "seed": 7, "run_id": "r2", "name": "transformer", "arm": "attention+swiglu"},
        {"commit": "def"},
        {"parameters": 1020},
        {"step": 9},
    ],
)
def test_rows_of_one_table_may_differ_in_these(make_result, other):
    assert comparable(make_result(), make_result(**other))
    require_comparable([make_result(), make_result(**other)])


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"data_hash": "x"}, "data_hash"),
        ({"tokenizer_hash": "x"}, "tokenizer_hash"),
        ({"tokens": 8192}, "tokens: 4096 against 8192"),
        ({"context_length": 128}, "context_length: 256 against 128"),
        ({"task_version": "2"}, "task_version: '1' against '2'"),
        ({"settings": {"max_new_tokens": 4}}, "settings.max_new_tokens"),
        ({"parameters": 1021}, "parameters: 1,000 against 1,021, 2.1% apart"),
    ],
)
def test_rows_of_one_table_may_not_differ_in_those(make_result, other, named):
    first, second = make_result(), make_result(**other)
    (found,) = differences(first, second)
    assert named in found
    assert not comparable(second, first)
    with pytest.raises(ReportError, match="may not share a table") as caught:
        require_comparable([first, first, second])
    assert found in str(caught.value)


def test_arms_and_oracles_are_a_rows_own():
    def result(task, **settings):
        identity = {"data_hash": "d", "tokenizer_hash": "t", "tokens": 1, "context_length": 8, "parameters": 1000}
        return SimpleNamespace(
            task=task,
            task_version="1",
            settings=settings,
            identity=SimpleNamespace(**identity),
            metrics=SimpleNamespace(kind=task),
        )

    plain, memorized = result("zeroshot", limit=3, memorize=[]), result("zeroshot", limit=3, memorize=[{"passes": 2}])
    assert differences(plain, memorized) == ()
    assert differences(plain, result("zeroshot", limit=4, memorize=[])) == ("settings.limit: 3 against 4",)
    assert differences(result("regret", oracle="a", periods=4), result("regret", oracle="b", periods=4)) == ()
    assert differences(result("niah", memorize=1), result("niah")) == ("settings.memorize: 1 against 'absent'",)
