"""The verbs that are made of tasks: what they hand on, and what they refuse."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from nested_lm.cli.main import app
from nested_lm_lab.evaluation import publish as publishing
from nested_lm_lab.evaluation.options import options_of
from nested_lm_lab.evaluation.registry import ENTRIES, find_task
from nested_lm_lab.evaluation.subject import Subject


@pytest.fixture
def seen(monkeypatch):
    found = []
    monkeypatch.setattr(Subject, "open", lambda source, **options: SimpleNamespace(source=source))
    monkeypatch.setattr(
        publishing, "publish", lambda task, subject, *, label, output: found.append((task, subject, label, output))
    )
    return found


def invoke(*arguments):
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def test_niah_hands_its_settings_on(seen, tmp_path):
    book = tmp_path / "book.txt"
    result = invoke("niah", tmp_path, "--tasks", "s1,s2", "--lengths", "512,2k", "--depths", "3", "--books", book)
    assert result.exit_code == 0, result.output
    ((task, subject, label, output),) = seen
    settings = task.settings
    assert task.name == "niah"
    assert settings.tasks == ("s1", "s2")
    assert settings.lengths == (512, 2048)
    assert settings.depths == (0.0, 0.5, 1.0)
    assert settings.samples == 24
    assert settings.books == (book,)
    assert (subject.source, label, output) == (tmp_path, None, None)


def test_options_of_other_tasks(seen, tmp_path):
    for arguments in (
        ("babilong", tmp_path, "--no-examples", "--label", "plain"),
        ("books", tmp_path, "one.txt", "two.txt", "--length", "4k", "--output", "x.json"),
        ("zeroshot", tmp_path, "--memorize", "passes=2", "--no-bigram", "--tasks", "piqa", "--data-dir", "d"),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 0, result.output
    babilong, books, zeroshot = (entry[0].settings for entry in seen)
    assert (babilong.examples, seen[0][2]) == (False, "plain")
    assert ([str(path) for path in books.files], books.length, str(seen[1][3])) == (
        ["one.txt", "two.txt"],
        4096,
        "x.json",
    )
    assert (zeroshot.memorize[0].passes, zeroshot.bigram_tokens, zeroshot.tasks) == (2, None, ("piqa",))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("niah", "--tasks", "s9"), "--tasks: unknown task 's9'; choices: all, niah, s1"),
        (("niah", "--haystack", "hay"), "--haystack: Input should be 'noise', 'needle' or 'books' (found 'hay')"),
        (("niah", "--samples", "0"), "greater than or equal to 1"),
        (("books", "--length", "1"), "--length: Input should be greater than or equal to 2 (found 1)"),
        (("babilong", "--tasks", "qa3"), "name the folder of bAbI's English files with --facts"),
        (("zeroshot", "--memorize", "twice"), "--memorize 'twice'"),
    ],
)
def test_impossible_options_are_refused(seen, tmp_path, arguments, message):
    verb, *options = arguments
    result = invoke(verb, tmp_path, *options)
    assert result.exit_code == 2
    assert message in result.output.replace("\n", " ")
    assert seen == []


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.kind)
def test_a_default_is_what_its_words_mean(entry):
    task = find_task(entry.kind)
    assert task.name == entry.kind
    assert task.Metrics.model_fields["kind"].annotation.__args__ == (entry.kind,)
    for field, option in options_of(task.Settings).items():
        if option.shown is not None:
            assert option.read(option.shown) == task.Settings.model_fields[field].default


def test_help_loads_no_torch():
    code = (
        "import sys; from typer.testing import CliRunner; from nested_lm.cli.main import app; "
        "done = CliRunner().invoke(app, ['eval', 'niah', '--help']); assert '--depths' in done.output, done.output; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
