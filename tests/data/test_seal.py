"""Whatever is changed in a data set or in the notes of its build is noticed, and no other data set is made of it."""

import hashlib
import json
import random
from pathlib import Path

import pytest

from nested_lm.data.manifest import read_manifest
from nested_lm.data.pipeline import build
from nested_lm.data.shards import TokenDataset
from nested_lm.errors import DataError, InUseError
from nested_lm.storage.lock import own_file
from nested_lm.storage.sealed import seal, unseal


def quiet(line: str) -> None:
    pass


@pytest.fixture
def folder(make_config) -> Path:
    return build(make_config(shard_tokens=1024), report=quiet)


def as_version_1(folder: Path) -> dict:
    """The manifest as the last version wrote it, without a seal."""
    document = unseal((folder / "manifest.json").read_bytes())[0] | {"schema_version": 1}
    (folder / "manifest.json").write_text(json.dumps(document, indent=2) + "\n")
    return document


def flip(path: Path, draw: random.Random) -> bytes:
    changed = bytearray(path.read_bytes())
    changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the notes of the build."""
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file() and ".build" not in p.parts}


def test_no_flip_in_a_manifest_goes_unnoticed(folder):
    path = folder / "manifest.json"
    content = path.read_bytes()
    draw = random.Random(1)
    for _ in range(200):
        path.write_bytes(flip(path, draw))
        with pytest.raises(DataError, match="is damaged or of another version"):
            read_manifest(folder)
        path.write_bytes(content)


FORGERIES = {
    "a split is missing": lambda m: m["splits"].pop("test"),
    "fewer tokens than the tokenizer has": lambda m: m["tokenizer"].update(vocab_size=100),
    "documents start with another token": lambda m: m["tokenizer"].update(start=1),
    "a device for the documents": lambda m: m["documents"].update(file="/dev/zero"),
    "a device for a shard": lambda m: m["splits"]["train"]["shards"][0].update(file="/dev/zero"),
    "more tokens in a shard": lambda m: m["splits"]["train"]["shards"][0].update(tokens=9),
    "more documents": lambda m: m["splits"]["train"].update(documents=1),
    "other bytes": lambda m: m["splits"]["train"].update(bytes=1),
    "another recipe": lambda m: m["recipe"].update(period_years=1),
    "another source": lambda m: m["source"].update(digest="0"),
    "no period": lambda m: m.update(periods=[{}]),
    "a list": lambda m: m.update(splits=[]),
}


@pytest.mark.parametrize("version", [1, 2])
def test_a_manifest_that_contradicts_its_files_is_refused(folder, version):
    """Also with a seal that fits, and without one as the last version wrote it."""
    path = folder / "manifest.json"
    whole = as_version_1(folder)
    for name, forge in FORGERIES.items():
        document = json.loads(json.dumps(whole))
        forge(document)
        document["schema_version"] = version
        path.write_bytes(json.dumps(document).encode() if version == 1 else seal(document, indent=2))
        with pytest.raises(DataError):
            assert not TokenDataset.open(folder, "train"), name


def test_documents_longer_than_their_shard(folder):
    path = folder / "documents.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[-1]["tokens"] += 1
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    document = as_version_1(folder) | {"schema_version": 2}
    document["documents"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "manifest.json").write_bytes(seal(document, indent=2))
    with pytest.raises(DataError, match="contradict each other"):
        TokenDataset.open(folder, rows[-1]["split"])


@pytest.mark.parametrize("victim", ["manifest.json", "documents.jsonl", "shards/train-00000.bin", "tokenizer.json"])
def test_a_folder_or_a_device_in_place_of_a_file(folder, victim):
    path = folder / victim
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match=path.name):
        TokenDataset.open(folder, "train")
    path.rmdir()
    path.symlink_to("/dev/zero")
    with pytest.raises(DataError, match=path.name):
        TokenDataset.open(folder, "train")


def test_a_manifest_of_the_last_version_loads_and_is_sealed_by_a_rerun(folder, make_config):
    before = read_manifest(folder).data_hash
    as_version_1(folder)
    assert TokenDataset.open(folder, "train").data_hash == before
    lines = []
    build(make_config(shard_tokens=1024), report=lines.append)
    assert "manifest.json of an earlier version was checked and sealed" in lines[0]
    assert read_manifest(folder).schema_version == 2
    assert read_manifest(folder).data_hash == before


def test_flips_in_the_notes_of_a_build_make_no_other_data_set(make_config):
    """An unfinished build with a changed note gives the bytes of an undisturbed one."""
    config = make_config(shard_tokens=1024)
    folder = build(config, report=quiet)
    wanted = contents(folder)
    draw = random.Random(2)
    for note in sorted((folder / ".build").iterdir()):
        (folder / "manifest.json").unlink()
        note.write_bytes(flip(note, draw))
        build(config, report=quiet)
        assert contents(folder) == wanted, note.name


def test_two_builds_of_one_folder_do_not_meet(make_config):
    config = make_config(shard_tokens=1024)
    folder = Path(config.output_dir)
    with own_file(folder, activity="another build"), pytest.raises(InUseError, match="another build"):
        build(config, report=quiet)
    assert not folder.exists()
    assert build(config, report=quiet).is_dir()
    assert not list(folder.parent.glob(".lock-*"))
