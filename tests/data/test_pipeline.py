import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from nested_lm.data.manifest import read_manifest
from nested_lm.data.notes import sealed, unsealed
from nested_lm.data.pipeline import build
from nested_lm.data.shards import TokenDataset
from nested_lm.data.split import SPLITS
from nested_lm.data.tokenizer import TextTokenizer
from nested_lm.errors import DataError
from nested_lm.storage.atomic import write_atomically


def quiet(line: str) -> None:
    pass


def files_of(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of change of every file of a data set, the build's own notes left out."""
    paths = [p for p in folder.rglob("*") if p.is_file() and ".build" not in p.parts]
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in paths}


def contents_of(folder: Path) -> dict[str, bytes]:
    return {name: content for name, (content, _) in files_of(folder).items()}


def failure(config) -> str:
    with pytest.raises(DataError) as caught:
        build(config, report=quiet)
    return str(caught.value)


class TestBuild:
    def test_every_document_comes_back_from_its_shard(self, make_config, source):
        folder = build(make_config(shard_tokens=1024), report=quiet)
        tokenizer = TextTokenizer.load(folder / "tokenizer.json")
        found = {}
        for split in SPLITS:
            dataset = TokenDataset.open(folder, split)
            for index, row in enumerate(dataset.documents):
                assert row.split == split
                found[row.id] = tokenizer.decode(dataset.tokens(index).tolist())
                assert row.bytes == len(found[row.id].encode())
                assert 0 not in dataset.tokens(index)
        assert found == {path.name: path.read_text() for path in source.iterdir()}

    def test_manifest_counts_what_is_there(self, make_config):
        lines = []
        folder = build(make_config(shard_tokens=1024), report=lines.append)
        manifest = read_manifest(folder)
        assert set(manifest.splits) == set(SPLITS)
        assert len(manifest.splits["train"].shards) > 1
        for split, record in manifest.splits.items():
            dataset = TokenDataset.open(folder, split)
            assert record.documents == len(dataset.documents)
            assert record.tokens == dataset.num_tokens == sum(shard.tokens for shard in record.shards)
            assert record.bytes == sum(row.bytes for row in dataset.documents)
            assert f"{split}: {record.documents} documents, {record.tokens:,} tokens" in "\n".join(lines)
        assert not list(folder.rglob(".tmp-*"))

    def test_periods(self, make_config, write_lines):
        years = [1790, 1814, 1815, 1839, 1866]
        path = write_lines(*({"text": f"{year} {i}", "date": year} for year in years for i in range(30)))
        folder = build(make_config(folder={"path": str(path), "date_field": "date"}), report=quiet)
        manifest = read_manifest(folder)
        assert [p.label for p in manifest.periods] == ["1790-1814", "1815-1839", "1840-1864", "1865-1866"]
        assert [sum(p.documents.values()) for p in manifest.periods] == [60, 60, 0, 30]
        rows = [row for split in SPLITS for row in TokenDataset.open(folder, split).documents]
        assert {(int(row.date), row.period) for row in rows} == {
            (1790, 0), (1814, 0), (1815, 1), (1839, 1), (1866, 3),
        }  # fmt: skip

    def test_duplicates_are_removed_and_counted(self, make_config, source):
        (source / "copy.txt").write_text("  " + (source / "05.txt").read_text().replace(" ", "\n\n"))
        (source / "composed.txt").write_text("Zo\u00eb au lait, deux fois")
        (source / "decomposed.txt").write_text("Zoe\u0308 au lait, deux fois")
        manifest = read_manifest(build(make_config(), report=quiet))
        assert manifest.duplicates_removed == 2
        assert sum(split.documents for split in manifest.splits.values()) == 61

    def test_duplicates_can_stay_and_then_share_a_split(self, make_config, source, tmp_path):
        (source / "copy.txt").write_text((source / "05.txt").read_text())
        folder = build(make_config(deduplicate="none"), report=quiet)
        rows = {row.id: row for split in SPLITS for row in TokenDataset.open(folder, split).documents}
        assert len(rows) == 61
        assert rows["copy.txt"].split == rows["05.txt"].split

    def test_a_document_keeps_its_split_when_others_come_and_go(self, make_config, source, tmp_path):
        def splits(folder):
            return {row.sha256: s for s in SPLITS for row in TokenDataset.open(folder, s).documents}

        before = splits(build(make_config(), report=quiet))
        for index in range(0, 60, 7):
            (source / f"{index:02d}.txt").rename(source / f"z{index}.txt")
        (source / "10.txt").unlink()
        (source / "new.txt").write_text("something new")
        after = splits(build(make_config(output_dir=str(tmp_path / "second")), report=quiet))
        shared = before.keys() & after.keys()
        assert len(shared) == 59
        assert all(before[key] == after[key] for key in shared)

    def test_skips_are_in_the_manifest(self, make_config, source):
        (source / "empty.txt").write_text(" ")
        (source / "latin.txt").write_bytes(b"ros\xe9")
        assert "empty.txt: empty" in failure(make_config())
        manifest = read_manifest(build(make_config(folder={"on_bad_document": "skip"}), report=quiet))
        assert manifest.skipped == {"empty": 1, "not_utf8": 1}

    def test_loaded_tokenizer(self, make_config, tmp_path):
        first = build(make_config(), report=quiet)
        spec = {"kind": "file", "path": str(first / "tokenizer.json")}
        second = build(make_config(tokenizer=spec, output_dir=str(tmp_path / "second")), report=quiet)
        datasets = [TokenDataset.open(folder, "test") for folder in (first, second)]
        assert datasets[0].tokenizer_hash == datasets[1].tokenizer_hash
        assert datasets[0].data_hash == datasets[1].data_hash


class TestBadInput:
    def test_nothing_left(self, make_config, write_lines):
        path = write_lines({"text": ""})
        message = failure(make_config(folder={"path": str(path), "on_bad_document": "skip"}))
        assert "no document is left (1 empty)" in message

    def test_a_split_without_documents(self, make_config, write_lines):
        path = write_lines({"text": "the only document"})
        message = failure(make_config(folder={"path": str(path)}))
        assert "but none of the 1 documents" in message
        assert "give the split a larger share" in message

    def test_vocabulary_larger_than_the_text_gives(self, make_config):
        message = failure(make_config(tokenizer={"kind": "byte_bpe", "vocab_size": 5000}))
        assert "tokenizer.vocab_size is 5000" in message

    def test_output_folder_with_foreign_files(self, make_config, tmp_path):
        (tmp_path / "built").mkdir()
        (tmp_path / "built" / "thesis.txt").write_text("precious")
        assert "is not empty and holds no data set: thesis.txt" in failure(make_config())
        assert (tmp_path / "built" / "thesis.txt").read_text() == "precious"

    def test_output_folder_that_is_a_file(self, make_config, tmp_path):
        (tmp_path / "built").write_text("")
        with pytest.raises(DataError):
            build(make_config(), report=quiet)

    def test_disk_full(self, make_config, monkeypatch, tmp_path):
        real = Path.open

        def full(self, mode="r", *args, **kwargs):
            if "train-00001.bin" in self.name and "w" in mode:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(self, mode, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", full)
            message = failure(make_config(shard_tokens=1024))
        assert "no space left on the disk while writing" in message
        lines = []
        folder = build(make_config(shard_tokens=1024), report=lines.append)
        assert "keeping 1 finished shards" in lines
        assert not any(line.startswith("shards/train-00000") for line in lines)
        assert not list(folder.rglob(".tmp-*"))

    def test_a_full_disk_leaves_the_old_file(self, tmp_path):
        path = tmp_path / "file"
        write_atomically(path, b"old")

        def parts():
            yield b"new"
            raise OSError(errno.ENOSPC, "full")

        with pytest.raises(DataError, match="no space left"):
            write_atomically(path, parts())
        assert [p.name for p in tmp_path.iterdir()] == ["file"]
        assert path.read_bytes() == b"old"


class TestRerun:
    def test_finished_build_is_left_alone(self, make_config):
        folder = build(make_config(), report=quiet)
        before = files_of(folder)
        lines = []
        build(make_config(), report=lines.append)
        assert lines == [f"{folder}: up to date"]
        assert files_of(folder) == before

    def test_same_bytes_wherever_and_whenever_it_is_built(self, make_config, tmp_path):
        first = contents_of(build(make_config(), report=quiet))
        second = contents_of(build(make_config(output_dir=str(tmp_path / "b")), report=quiet))
        assert first.keys() == second.keys()
        assert all(first[name] == second[name] for name in first if name != "manifest.json")
        manifests = [json.loads(c["manifest.json"]) for c in (first, second)]
        for manifest in manifests:
            del manifest["created_from"], manifest["seal"]  # of the configuration, whose output folder differs
        assert manifests[0] == manifests[1]

    @pytest.mark.parametrize("writes", range(1, 14))
    def test_a_build_that_dies_goes_on_and_repeats_no_shard(self, make_config, tmp_path, monkeypatch, writes):
        """Dies at the n-th rename, for every n: what was finished before is not written again."""
        expected = contents_of(build(make_config(shard_tokens=1024, output_dir=str(tmp_path / "whole")), report=quiet))
        config = make_config(shard_tokens=1024)
        real = Path.replace
        done = Counter()

        def die(self, target):
            if sum(done.values()) == writes:
                raise KeyboardInterrupt
            done[target.name] += 1
            return real(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", die)
            with pytest.raises(KeyboardInterrupt):
                build(config, report=quiet)
        patch_target = Path(config.output_dir)
        written_before = {p.name: p.stat().st_mtime_ns for p in (patch_target / "shards").glob("*.bin")}
        finished = {p.stem for p in (patch_target / ".build").glob("t*-*.json")}
        build(config, report=quiet)
        after = {p.name: p.stat().st_mtime_ns for p in (patch_target / "shards").glob("*.bin")}
        for name, stamp in written_before.items():
            if name.removesuffix(".bin") in finished:
                assert after[name] == stamp
        found = contents_of(patch_target)
        assert {n: c for n, c in found.items() if n != "manifest.json"} == {
            n: c for n, c in expected.items() if n != "manifest.json"
        }

    def test_killed_process(self, make_config, tmp_path):
        config = make_config(shard_tokens=1024)
        code = (
            "import sys, time; from nested_lm.config.data import DataConfig; "
            "from nested_lm.data.pipeline import build\n"
            "def slow(line):\n    print(line, flush=True); time.sleep(60 if 'train-00000' in line else 0)\n"
            "build(DataConfig.model_validate_json(sys.argv[1]), report=slow)"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code, config.model_dump_json()], stdout=subprocess.PIPE, text=True
        )
        try:
            while "train-00000" not in process.stdout.readline():
                assert process.poll() is None
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
            process.stdout.close()
        with pytest.raises(DataError, match="holds no finished data set"):
            TokenDataset.open(Path(config.output_dir), "train")
        lines = []
        build(config, report=lines.append)
        assert "keeping 1 finished shards" in lines
        assert not any(line.startswith(("tokenizer:", "shards/train-00000")) for line in lines)

    @pytest.mark.parametrize("victim", ["shards/train-00001.bin", "tokenizer.json", "documents.jsonl"])
    @pytest.mark.parametrize("how", ["missing", "truncated", "changed"])
    def test_damage_is_mended_and_the_rest_kept(self, make_config, victim, how):
        config = make_config(shard_tokens=1024)
        folder = build(config, report=quiet)
        before = files_of(folder)
        damage(folder / victim, how)
        build(config, report=quiet)
        after = files_of(folder)
        assert contents_of(folder) == {name: content for name, (content, _) in before.items()}
        shards = [name for name in before if name.startswith("shards/") and name != victim]
        assert all(after[name] == before[name] for name in shards)

    def test_mends_without_its_notes(self, make_config):
        config = make_config()
        folder = build(config, report=quiet)
        before = contents_of(folder)
        for path in (folder / ".build").iterdir():
            path.unlink()
        damage(folder / "shards" / "test-00000.bin", "changed")
        build(config, report=quiet)
        assert contents_of(folder) == before

    def test_shards_of_another_tokenizer_are_not_kept(self, make_config):
        folder = build(make_config(), report=quiet)
        marker = folder / ".build" / "train-00000.json"
        key = read_manifest(folder).fingerprint
        marker.write_bytes(sealed(unsealed(marker.read_bytes(), key=key) | {"tokenizer": "0" * 64}, key=key))
        (folder / "manifest.json").unlink()
        lines = []
        build(make_config(), report=lines.append)
        assert "keeping 2 finished shards" in lines
        assert any(line.startswith("shards/train-00000.bin") for line in lines)

    def test_another_configuration_is_refused_by_name(self, make_config):
        folder = build(make_config(), report=quiet)
        before = files_of(folder)
        message = failure(make_config(period_years=50, tokenizer={"kind": "byte_bpe", "vocab_size": 270}))
        assert "period_years 25 -> 50; tokenizer.vocab_size 280 -> 270" in message
        assert files_of(folder) == before

    def test_another_source_is_refused(self, make_config, source):
        build(make_config(), report=quiet)
        time.sleep(0.01)
        (source / "07.txt").write_text("rewritten")
        assert "the texts of the source changed" in failure(make_config())

    def test_a_touched_or_moved_source_is_the_same(self, make_config, source):
        build(make_config(), report=quiet)
        os.utime(source / "07.txt", (1, 1))
        moved = source.rename(source.with_name("moved"))
        lines = []
        build(make_config(folder={"path": str(moved)}), report=lines.append)
        assert lines[0].endswith("up to date")

    def test_an_unfinished_build_of_another_configuration_starts_over(self, make_config, monkeypatch):
        def die(*args):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("nested_lm.data.pipeline._finish", die)
            with pytest.raises(KeyboardInterrupt):
                build(make_config(), report=quiet)
        lines = []
        folder = build(make_config(tokenizer={"kind": "byte_bpe", "vocab_size": 270}), report=lines.append)
        assert any("starting over" in line for line in lines)
        assert TokenDataset.open(folder, "train").vocab_size == 270

    def test_a_source_that_changes_under_the_build(self, make_config, source):
        def change(line):
            if line.startswith("tokenizer"):
                for path in source.iterdir():
                    path.write_text("all different now, " + path.name)

        with pytest.raises(DataError, match="changed while the data set was being built"):
            build(make_config(), report=change)


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    time.sleep(0.01)  # a file is hashed again only when its time of change differs
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])


class TestOpen:
    @pytest.mark.parametrize("how", ["missing", "truncated", "changed"])
    def test_damaged_shard_is_named(self, make_config, how):
        folder = build(make_config(), report=quiet)
        shard = folder / "shards" / "validation-00000.bin"
        damage(shard, how)
        with pytest.raises(DataError) as caught:
            TokenDataset.open(folder, "validation")
        message = str(caught.value)
        assert message.startswith(f"{shard} {'is missing' if how == 'missing' else 'does not match its manifest'}")
        assert "expected" in message
        assert "found" in message
        assert "Rerun `nested-lm data` with the preset of data set 'test'" in message
        TokenDataset.open(folder, "train")

    @pytest.mark.parametrize("victim", ["documents.jsonl", "tokenizer.json"])
    def test_changed_side_files(self, make_config, victim):
        folder = build(make_config(), report=quiet)
        damage(folder / victim, "changed")
        with pytest.raises(DataError, match=f"{victim} does not match its manifest"):
            TokenDataset.open(folder, "train")

    def test_without_verification_sizes_still_count(self, make_config):
        folder = build(make_config(), report=quiet)
        shard = folder / "shards" / "test-00000.bin"
        damage(shard, "changed")
        TokenDataset.open(folder, "test", verify=False)
        damage(shard, "truncated")
        with pytest.raises(DataError, match=r"expected \d+ bytes"):
            TokenDataset.open(folder, "test", verify=False)

    def test_damaged_manifest(self, make_config):
        folder = build(make_config(), report=quiet)
        (folder / "manifest.json").write_text('{"schema_version": 1}')
        with pytest.raises(DataError, match="damaged or of another version"):
            TokenDataset.open(folder, "train")
        (folder / "manifest.json").unlink()
        lines = []
        build(make_config(), report=lines.append)
        assert any(line.startswith("keeping") for line in lines)

    def test_no_data_set(self, tmp_path):
        with pytest.raises(DataError, match="holds no finished data set"):
            TokenDataset.open(tmp_path, "train")
