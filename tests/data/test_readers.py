"""Every way a source can be wrong: one error naming file and place, or a counted skip."""

import datetime
import errno
import gzip
import json
import os
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
        ("no_text", b'{"body": "x"}', "fields: 'body'"),
        ("no_text", b'{"text": null}', "'text'"),
        ("not_text", b'{"text": 7}', "type int"),
        ("broken_json", b'{"text": "x", "n": ' + b"9" * 5000 + b"}", "4300 digits"),
        ("broken_json", b"[" * 20_000, "recursion"),
        ("no_text", b'{"\\ud800": 1, "' + b"x" * 9 + b'": 2}', "xx', '\\ud800'"),
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
        assert message.startswith(f"{path} is cut short after line ")

    @pytest.mark.parametrize("ending", ["gz", "zst"])
    def test_not_compressed_at_all(self, tmp_path, ending):
        path = tmp_path / f"rows.jsonl.{ending}"
        path.write_bytes(as_lines(rows(2)))
        assert "cannot be read after line 0" in refused(path)

    @pytest.mark.parametrize("ending", ["gz", "zst"])
    def test_a_compressed_file_of_no_bytes(self, tmp_path, ending):
        path = tmp_path / f"rows.jsonl.{ending}"
        path.write_bytes(b"")
        assert f"{path} is cut short after line 0: it has no bytes" in refused(path, on_bad_document="skip")

    @pytest.mark.parametrize("ending", ["gz", "zst"])
    def test_damage_in_the_middle_is_not_called_cut_short(self, tmp_path, ending):
        content = as_lines({"text": f"{index} {index**9}"} for index in range(20_000))
        packed = bytearray(gzip.compress(content) if ending == "gz" else zstandard.compress(content))
        packed[len(packed) // 2 : len(packed) // 2 + 64] = b"\xff" * 64
        path = tmp_path / f"rows.jsonl.{ending}"
        path.write_bytes(packed)
        message = refused(path)
        assert "cut short" not in message
        assert f"{path}" in message

    def test_truncated_parquet(self, tmp_path):
        path = tmp_path / "rows.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"text": ["a" * 1000]}), path)
        path.write_bytes(path.read_bytes()[:-20])
        assert "cannot be read after row 0" in refused(path)

    def test_parquet_without_the_column(self, tmp_path):
        path = tmp_path / "rows.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"body": ["a"], "id": [1]}), path)
        message = refused(path)
        assert "no column 'text'" in message
        assert "columns: 'body', 'id'" in message

    def test_parquet_with_the_column_twice(self, tmp_path):
        path = tmp_path / "rows.parquet"
        pyarrow.parquet.write_table(pyarrow.table([["a"], ["b"]], names=["text", "text"]), path)
        assert "has 2 columns 'text'" in refused(path, on_bad_document="skip")


class TestParquetTimes:
    def days(self, tmp_path, array) -> list:
        path = tmp_path / "rows.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"text": ["x"] * len(array), "day": array}), path)
        return [getattr(item, "date", None) or item.reason for item in read(path, date_field="day")]

    @pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
    def test_every_unit(self, tmp_path, unit):
        per_second = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[unit]
        seconds = [-5_000_000_000, -1, 0, 4_000_000_000]
        array = pyarrow.array([second * per_second for second in seconds], pyarrow.timestamp(unit))
        assert self.days(tmp_path, array) == ["1811-07-23", "1969-12-31", "1970-01-01", "2096-10-02"]

    def test_nanoseconds_that_python_cannot_hold(self, tmp_path):
        assert self.days(tmp_path, pyarrow.array([1, -1], pyarrow.timestamp("ns"))) == ["1970-01-01", "1969-12-31"]

    def test_days_of_their_own_zone(self, tmp_path):
        array = pyarrow.array([23 * 3600], pyarrow.timestamp("s", tz="Europe/Berlin"))
        assert self.days(tmp_path, array) == ["1970-01-02"]

    def test_out_of_range_null_and_unknown_zones_are_skips(self, tmp_path):
        array = pyarrow.array([400_000_000_000, None, 0], pyarrow.timestamp("s"))
        assert self.days(tmp_path, array) == ["bad_date", "no_date", "1970-01-01"]
        assert self.days(tmp_path, pyarrow.array([0], pyarrow.timestamp("s", tz="Moon/Base"))) == ["bad_date"]
        assert self.days(tmp_path, pyarrow.array([10_000_000], pyarrow.date32())) == ["bad_date"]


class TestScan:
    """What a scan cannot look into is an error that names it, or counted."""

    @pytest.fixture
    def folder(self, tmp_path):
        folder = tmp_path / "in"
        folder.mkdir()
        (folder / "a.txt").write_text("one")
        return folder

    def counted(self, folder) -> Counter:
        source = FolderSource(kind="folder", path=str(folder), on_bad_document="skip")
        corpus = open_corpus(source, folder.parent / "absent" / "d.json")
        assert [document.text for _, document in corpus.documents()] == ["one"]
        return Counter(corpus.unseen)

    def test_links_to_folders_and_files_are_read(self, folder, tmp_path):
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "b.txt").write_text("two")
        (folder / "sub").symlink_to(tmp_path / "elsewhere")
        (folder / "c.txt").symlink_to(tmp_path / "elsewhere" / "b.txt")
        assert [item.id for item in read(folder)] == ["a.txt", "c.txt", "sub/b.txt"]

    def test_a_broken_link(self, folder):
        (folder / "d.jsonl").symlink_to("/gone/d.jsonl")
        message = refused(folder)
        assert f"'{folder}/d.jsonl': broken link: No such file" in message
        assert "on_bad_document=skip" in message
        assert self.counted(folder) == {"broken_link": 1}

    def test_a_circle_of_links(self, folder):
        (folder / "deep").mkdir()
        (folder / "deep" / "up").symlink_to(folder)
        assert "deep/up': link in a circle" in refused(folder)
        assert self.counted(folder) == {"link_in_a_circle": 1}

    def test_a_folder_without_permission(self, folder, monkeypatch):
        (folder / "locked").mkdir()
        real = os.scandir

        def scandir(path):
            if path.name == "locked":  # root reads every folder, so that a mode would not do
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return real(path)

        monkeypatch.setattr(os, "scandir", scandir)
        assert "locked': unreadable folder: Permission denied" in refused(folder)
        assert self.counted(folder) == {"unreadable_folder": 1}

    def test_a_pipe_and_a_name_that_is_not_utf8(self, folder):
        os.mkfifo(folder / "p.txt")
        (folder / os.fsdecode(b"caf\xe9.txt")).write_text("two")
        message = refused(folder)
        assert "p.txt': no regular file" in message
        assert "caf\\udce9.txt': name not utf8" in message
        assert self.counted(folder) == {"no_regular_file": 1, "name_not_utf8": 1}

    def test_hidden_files_and_folders_are_left_out_and_counted(self, folder, tmp_path):
        (folder / ".ipynb_checkpoints").mkdir()
        (folder / ".ipynb_checkpoints" / "note.txt").write_text("old")
        (folder / ".b.txt").write_text("hidden")
        assert len(read(folder)) == 1
        source = FolderSource(kind="folder", path=str(folder))
        assert open_corpus(source, tmp_path / "absent" / "d.json").hidden == 2


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
        assert "no file that ends in one of" in refused(tmp_path / "a.pdf")

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
