"""Every way a source can be wrong: one error naming file and place, or a counted skip."""

import datetime
import gzip
import json
import sys
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from nested_lm.config.data import FolderSource
from nested_lm.data.document import BadDocument, Document, parse_date
from nested_lm.data.source import open_corpus
from nested_lm.errors import DataError


def read(path, **fields):
    """All items of a folder source, bad ones included."""
    source = FolderSource(kind="folder", path=str(path), **fields)
    return list(open_corpus(source, path.parent / "absent" / "digests.json").read())


def refused(path, **fields) -> str:
    source = FolderSource(kind="folder", path=str(path), **fields)
    with pytest.raises(DataError) as caught:
        list(open_corpus(source, path.parent / "absent" / "digests.json").documents())
    return str(caught.value)


def rows(count):
    return [{"text": f"text {index}", "year": 1900 + index} for index in range(count)]


def as_lines(items) -> bytes:
    return "".join(json.dumps(item) + "\n" for item in items).encode()


class TestFormats:
    def test_text_files_in_order_of_their_names(self, tmp_path):
        folder = tmp_path / "texts"
        (folder / "b").mkdir(parents=True)
        (folder / "b" / "x.txt").write_text("zwei")
        (folder / "a.txt").write_bytes(b"\xef\xbb\xbfeins")  # a byte order mark is no text
        (folder / "notes.md").write_text("not read")
        items = read(folder)
        assert [(item.id, item.text, item.date) for item in items] == [
            ("a.txt", "eins", None),
            ("b/x.txt", "zwei", None),
        ]
        source = FolderSource(kind="folder", path=str(folder))
        assert open_corpus(source, tmp_path / "absent" / "d.json").ignored == 1

    @pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst"])
    def test_json_lines(self, tmp_path, ending):
        content = as_lines(rows(3))
        if ending.endswith("gz"):
            content = gzip.compress(content)
        elif ending.endswith("zst"):  # two frames, as parallel compressors write them
            half = len(as_lines(rows(1)))
            content = zstandard.compress(content[:half]) + zstandard.compress(content[half:])
        path = tmp_path / f"rows.{ending}"
        path.write_bytes(content)
        items = read(path, date_field="year")
        assert [(item.id, item.text, item.date) for item in items] == [
            (f"rows.{ending}:{index + 1}", f"text {index}", str(1900 + index)) for index in range(3)
        ]

    def test_parquet_over_several_row_groups(self, tmp_path):
        path = tmp_path / "rows.parquet"
        table = pyarrow.table(
            {
                "body": [f"text {index}" for index in range(600)],
                "day": [datetime.date(1900, 1, 1) + datetime.timedelta(days=index) for index in range(600)],
                "other": list(range(600)),
            }
        )
        pyarrow.parquet.write_table(table, path, row_group_size=100)
        items = read(path, text_field="body", date_field="day")
        assert len(items) == 600
        assert items[300] == Document("rows.parquet:301", "text 300", "1900-10-28", f"{path}:301")

    def test_blank_lines_are_no_documents(self, write_lines):
        assert len(read(write_lines(b'{"text": "a"}', b"", b'{"text": "b"}'))) == 2


class TestBadDocuments:
    """Each is an error with its place, or a skip counted under its reason."""

    CASES = (
        ("not_utf8", b'{"text": "ros\xe9"}', "0xe9"),
        ("broken_json", b'{"text": "cut", ', "property name"),
        ("broken_json", b'["text"]', "found list"),
        ("no_text", b'{"body": "x"}', "fields: body"),
        ("no_text", b'{"text": null}', "'text'"),
        ("not_text", b'{"text": 7}', "type int"),
        ("not_unicode", b'{"text": "\\ud800"}', "lone surrogate"),
        ("empty", b'{"text": " \\n "}', "empty"),
        ("too_large", b'{"text": "' + b"x" * 101 + b'"}', "max_document_bytes is 100"),
    )

    @pytest.mark.parametrize(("reason", "line", "found"), CASES)
    def test_error_names_file_and_line(self, write_lines, reason, line, found):
        path = write_lines({"text": "good"}, line, {"text": "also good"})
        message = refused(path, max_document_bytes=100)
        assert message.startswith(f"{path}:2: {reason.replace('_', ' ')}: ")
        assert found in message
        assert "on_bad_document=skip" in message

    @pytest.mark.parametrize(("reason", "line", "found"), CASES)
    def test_skip_is_counted(self, write_lines, reason, line, found):
        path = write_lines({"text": "good"}, line, {"text": "also good"})
        source = FolderSource(kind="folder", path=str(path), on_bad_document="skip", max_document_bytes=100)
        skipped = Counter()
        kept = list(open_corpus(source, path.parent / "absent" / "d.json").documents(skipped))
        assert [document.text for _, document in kept] == ["good", "also good"]
        assert skipped == {reason: 1}

    def test_a_line_too_long_to_hold_is_passed_over(self, write_lines):
        line = b'{"text": "' + b"x" * (3 << 20) + b'"}'
        items = read(write_lines(line, {"text": "next"}), max_document_bytes=1000)
        assert isinstance(items[0], BadDocument)
        assert (items[0].reason, items[1].text) == ("too_large", "next")

    @pytest.mark.parametrize(
        ("content", "reason"), [(b"ros\xe9", "not utf8"), (b"", "empty"), (b"x" * 101, "too large")]
    )
    def test_text_file(self, tmp_path, content, reason):
        path = tmp_path / "bad.txt"
        path.write_bytes(content)
        assert refused(path, max_document_bytes=100).startswith(f"{path}: {reason}: ")

    @pytest.mark.parametrize(
        ("row", "reason"),
        [
            ({"text": "a"}, "no date"),
            ({"text": "a", "year": "MDCC"}, "bad date"),
            ({"text": "a", "year": True}, "bad"),
        ],
    )
    def test_a_promised_date_must_be_there(self, write_lines, row, reason):
        assert reason in refused(write_lines(row), date_field="year")

    def test_parquet_row_that_is_not_utf8(self, tmp_path):
        path = tmp_path / "rows.parquet"
        strings = pyarrow.array([b"good", b"ros\xe9"]).view(pyarrow.string())
        pyarrow.parquet.write_table(pyarrow.table({"text": strings}), path)
        assert refused(path).startswith(f"{path}:2: not utf8")


class TestDamagedFiles:
    """A file that breaks off is an error even where bad documents may be skipped: text would be missing."""

    @pytest.mark.parametrize("ending", ["gz", "zst"])
    def test_truncated_compression(self, tmp_path, ending):
        content = as_lines({"text": f"{index} {index**9}"} for index in range(20_000))
        packed = gzip.compress(content) if ending == "gz" else zstandard.compress(content)
        path = tmp_path / f"rows.jsonl.{ending}"
        path.write_bytes(packed[: len(packed) // 2])
        message = refused(path, on_bad_document="skip")
        assert message.startswith(f"{path} is damaged after line ")

    @pytest.mark.parametrize("ending", ["gz", "zst"])
    def test_not_compressed_at_all(self, tmp_path, ending):
        path = tmp_path / f"rows.jsonl.{ending}"
        path.write_bytes(as_lines(rows(2)))
        assert "is damaged after line 0" in refused(path)

    def test_truncated_parquet(self, tmp_path):
        path = tmp_path / "rows.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"text": ["a" * 1000]}), path)
        path.write_bytes(path.read_bytes()[:-20])
        assert "is damaged after row 0" in refused(path)

    def test_parquet_without_the_column(self, tmp_path):
        path = tmp_path / "rows.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"body": ["a"], "id": [1]}), path)
        message = refused(path)
        assert "no column 'text'" in message
        assert "columns: body, id" in message


class TestMissing:
    def test_no_such_path(self, tmp_path):
        assert "does not exist" in refused(tmp_path / "nowhere")

    def test_empty_folder(self, tmp_path):
        (tmp_path / "empty").mkdir()
        assert "holds no text: 0 files" in refused(tmp_path / "empty")

    def test_folder_of_other_files(self, tmp_path):
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "a.pdf").write_bytes(b"x")
        assert "1 files, none of them ending in .txt" in refused(tmp_path / "other")

    def test_file_of_another_kind(self, tmp_path):
        (tmp_path / "a.pdf").write_bytes(b"x")
        assert "Its ending is none of" in refused(tmp_path / "a.pdf")

    @pytest.mark.parametrize(("name", "package"), [("a.jsonl.zst", "zstandard"), ("a.parquet", "pyarrow")])
    def test_missing_package_names_the_extra(self, tmp_path, monkeypatch, name, package):
        (tmp_path / name).write_bytes(b"x")
        monkeypatch.setitem(sys.modules, package, None)
        message = refused(tmp_path / name)
        assert f"the package {package} is not installed" in message
        assert "pip install -c constraints.txt -e '.[data]'" in message


@pytest.mark.parametrize(
    ("value", "date"),
    [
        (1790, "1790"),
        ("1790", "1790"),
        ("1790-01", "1790-01"),
        (" 1790-01-08 ", "1790-01-08"),
        ("1790-01-08T12:00:00Z", "1790-01-08"),
        (datetime.datetime(1790, 1, 8, 3), "1790-01-08"),
        (datetime.date(1790, 1, 8), "1790-01-08"),
        ("1790-13-08", None),
        ("1791-02-29", None),
        ("0000", None),
        ("January 1790", None),
        (-5, None),
        (10_000, None),
        (1790.5, None),
        (True, None),
    ],
)
def test_dates(value, date):
    assert parse_date(value) == date
