import errno
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from nested_lm import checkpoint
from nested_lm.checkpoint import (
    Disk,
    check_tokenizer,
    find_checkpoint,
    folder_name,
    is_valid,
    list_checkpoints,
    load_weights,
    newest_checkpoint,
    prune_checkpoints,
    read_document,
    read_tensors,
    remove_stale,
    verify_checkpoint,
    write_checkpoint,
)
from nested_lm.errors import CheckpointError

KILLED = 9
OPERATIONS = ("make_folder", "write_tensors", "write_bytes", "sync", "rename", "remove_folder")


def write(root, step, *, milestone=None):
    extra = root.parent / "tokenizer.json"
    extra.write_text('{"model": "bpe"}')
    weight = torch.full((8, 16), float(step))
    write_checkpoint(
        root / folder_name(step),
        tensors={"model": {"weight": weight, "view": weight.T}, "optimizer": {}},
        documents={"train_state.json": {"step": step, "seconds": 0.1}},
        extra_files={"tokenizer.json": extra},
        config_hash="c0ffee",
        milestone=milestone,
    )
    return root / folder_name(step)


@pytest.fixture
def root(tmp_path):
    return tmp_path / "checkpoints"


class FailingDisk(Disk):
    """Counts operations and calls `fail` instead of the n-th; `fail` may write part of a file first."""

    def __init__(self, fail_at, fail):
        self.count, self.fail_at, self.fail = 0, fail_at, fail

    def __getattribute__(self, name):
        method = super().__getattribute__(name)
        if name not in OPERATIONS:
            return method

        def counted(*args):
            self.count += 1
            if self.count == self.fail_at:
                self.fail(name, method, args)
            return method(*args)

        return counted


def in_child(action):
    """Run in a forked process and return its exit code; 0 when the action returns."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
            os._exit(0)
        except BaseException:
            os._exit(77)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_round_trip(root):
    path = write(root, 120, milestone="period-1")
    assert path.name == "step-00000120"
    assert sorted(entry.name for entry in path.iterdir()) == [
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "tokenizer.json",
        "train_state.json",
    ]
    manifest = verify_checkpoint(path)
    assert (manifest["milestone"], manifest["config_hash"]) == ("period-1", "c0ffee")
    tensors = read_tensors(path, "model")
    assert torch.equal(tensors["view"], torch.full((16, 8), 120.0))
    assert read_document(path, "train_state.json") == {"step": 120, "seconds": 0.1}


class TestKilledAnywhere:
    """SIGKILL before, or in the middle of, every file operation of a write and of the pruning after it."""

    @staticmethod
    def kill(name, method, args):
        if name.startswith("write"):
            method(*args)
            os.truncate(args[0], args[0].stat().st_size // 2)
        os._exit(KILLED)

    def test_the_previous_checkpoint_is_never_lost(self, root):
        write(root, 1)
        write(root, 2)
        outcomes = []
        for number in range(1, 60):

            def write_and_prune(number=number):
                checkpoint._disk = FailingDisk(number, self.kill)
                write(root, 3)
                prune_checkpoints(root, keep=1)

            code = in_child(write_and_prune)
            assert code in (0, KILLED)
            newest = newest_checkpoint(root, report=pytest.fail)  # what is visible is whole
            outcomes.append(read_document(newest, "train_state.json")["step"])
            remove_stale(root)
            assert not list(root.glob(".*"))
            if code == 0:
                break
            shutil.rmtree(root / folder_name(3), ignore_errors=True)
            for step in (1, 2):
                write(root, step)
        assert code == 0, "the enumeration must reach the end of the work"
        assert len(outcomes) > 15
        assert outcomes == sorted(outcomes)
        assert set(outcomes) == {2, 3}

    def test_a_write_in_place_would_fail_this_test(self, root):
        """The control: the same kill in the middle of a plain overwrite leaves nothing readable."""
        path = write(root, 1)

        def overwrite():
            disk = FailingDisk(1, self.kill)
            disk.write_tensors(path / "model.safetensors", {"weight": torch.ones(8, 16)})

        assert in_child(overwrite) == KILLED
        assert newest_checkpoint(root) is None

    def test_replacing_a_damaged_one_is_safe_too(self, root):
        for number in range(1, 60):
            shutil.rmtree(root, ignore_errors=True)
            write(root, 1)
            (write(root, 2) / "model.safetensors").write_bytes(b"damaged")

            def rewrite(number=number):
                checkpoint._disk = FailingDisk(number, self.kill)
                write(root, 2)

            code = in_child(rewrite)
            assert read_document(newest_checkpoint(root), "train_state.json")["step"] in (1, 2)
            if code == 0:
                break
        assert code == 0
        assert is_valid(root / folder_name(2))


class TestDamage:
    def files(self, path):
        return sorted(entry.name for entry in path.iterdir())

    def test_every_bit_flip_is_found(self, root):
        path = write(root, 1)
        rng = random.Random(0)
        for name in self.files(path):
            file = path / name
            original = file.read_bytes()
            for _ in range(60):
                changed = bytearray(original)
                changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
                file.write_bytes(changed)
                # A flipped digit of the schema version names the version instead of the file.
                with pytest.raises(CheckpointError, match=f"{name}|checkpoint schema"):
                    verify_checkpoint(path)
            file.write_bytes(original)
        verify_checkpoint(path)

    def test_every_truncation_deletion_and_swap_is_found(self, root):
        path, other = write(root, 1), write(root, 2)
        for name in self.files(path):
            file = path / name
            original = file.read_bytes()
            for length in {0, 1, len(original) // 2, len(original) - 1}:
                file.write_bytes(original[:length])
                with pytest.raises(CheckpointError, match=name):
                    verify_checkpoint(path)
            file.unlink()
            with pytest.raises(CheckpointError, match=f"{name} is missing"):
                verify_checkpoint(path)
            file.write_bytes(original)
        (path / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
        with pytest.raises(CheckpointError, match=r"model\.safetensors was changed"):
            verify_checkpoint(path)

    def test_newest_names_and_skips_damaged_ones(self, root):
        for step in (1, 2, 3):
            write(root, step)
        (root / folder_name(3) / "model.safetensors").write_bytes(b"")
        (root / folder_name(4)).mkdir()
        notes = []
        assert newest_checkpoint(root, report=notes.append) == root / folder_name(2)
        assert len(notes) == 2
        assert "step-00000004" in notes[0]
        assert "model.safetensors" in notes[1]

    @pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ENOTCONN, errno.ESTALE])
    @pytest.mark.parametrize("name", ["manifest.json", "model.safetensors"])
    def test_what_the_system_says_while_a_file_is_read_is_damage_of_it(self, root, monkeypatch, number, name):
        """A bad sector, lost permission, a network file system that went away: the one before is used."""
        for step in (1, 2):
            write(root, step)
        original = Path.open

        def bad(self, *args, **kwargs):
            if self == root / folder_name(2) / name:
                raise OSError(number, os.strerror(number))
            return original(self, *args, **kwargs)

        monkeypatch.setattr(Path, "open", bad)
        notes = []
        assert newest_checkpoint(root, report=notes.append) == root / folder_name(1)
        assert len(notes) == 1
        assert f"{name} cannot be read: {os.strerror(number)}" in notes[0]

    def test_a_manifest_that_is_a_folder_is_damage(self, root):
        for step in (1, 2):
            write(root, step)
        (root / folder_name(2) / "manifest.json").unlink()
        (root / folder_name(2) / "manifest.json").mkdir()
        assert newest_checkpoint(root) == root / folder_name(1)
        with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read: Is a directory"):
            verify_checkpoint(find_checkpoint(root / folder_name(2)))

    def test_files_that_the_manifest_does_not_list_are_not_read(self, root):
        path = write(root, 1)
        (path / "extra.safetensors").write_bytes((path / "model.safetensors").read_bytes())
        (path / "extra.json").write_text("{}")
        for read in (lambda: read_tensors(path, "extra"), lambda: read_document(path, "extra.json")):
            with pytest.raises(CheckpointError, match=r"extra\..* is not listed in manifest\.json"):
                read()

    @pytest.mark.parametrize(
        "change",
        [
            {"files": {"../secret": {"bytes": 1, "xxh3_128": ""}}},
            {"files": {"model.safetensors": 3}},
            {"files": []},
            {"milestone": 3},
            {"config_hash": None},
        ],
    )
    def test_a_manifest_that_somebody_sealed_is_judged_too(self, root, change):
        path = write(root, 1)
        manifest = {key: value for key, value in verify_checkpoint(path).items() if key != "manifest_xxh3_128"}
        (path / "manifest.json").write_bytes(checkpoint._sealed(manifest | change))
        with pytest.raises(CheckpointError, match=r"manifest\.json has no usable"):
            verify_checkpoint(path)

    @pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"\x10\0\0\0\0\0\0\0[]              ", b"[" * 100_000])
    def test_files_that_somebody_sealed_are_judged_too(self, root, content):
        path = write(root, 1)
        manifest = {key: value for key, value in verify_checkpoint(path).items() if key != "manifest_xxh3_128"}
        for name in ("model.safetensors", "train_state.json"):
            (path / name).write_bytes(content)
            manifest["files"][name] = {"bytes": len(content), "xxh3_128": checkpoint._digest(path / name)}
        (path / "manifest.json").write_bytes(checkpoint._sealed(manifest))
        verify_checkpoint(path)
        with pytest.raises(CheckpointError, match=r"train_state\.json"):
            read_document(path, "train_state.json")
        with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
            read_tensors(path, "model")

    def test_a_checkpoint_and_its_run_folder_both_mean_it(self, root):
        old, newest = write(root, 1), write(root, 2)
        assert find_checkpoint(old) == old
        assert find_checkpoint(root.parent) == newest
        with pytest.raises(CheckpointError, match="is neither a checkpoint nor a run folder"):
            find_checkpoint(root)

    def test_no_folder_is_no_checkpoint(self, root):
        assert newest_checkpoint(root) is None
        assert list_checkpoints(root) == remove_stale(root) == prune_checkpoints(root, keep=1) == []

    def test_another_schema_is_refused(self, root, monkeypatch):
        monkeypatch.setattr(checkpoint, "SCHEMA_VERSION", 7)
        path = write(root, 1)
        monkeypatch.undo()
        with pytest.raises(CheckpointError, match="checkpoint schema 7, this version reads 1"):
            verify_checkpoint(path)

    @pytest.mark.parametrize("content", ["[]", "{}", '{"schema_version": "x"}', '"text"', "{"])
    def test_a_foreign_manifest_is_refused(self, root, content):
        path = write(root, 1)
        (path / "manifest.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            verify_checkpoint(path)


class TestExistingFolder:
    def test_a_valid_one_is_left_alone(self, root):
        path = write(root, 1)
        before = {entry.name: entry.stat().st_mtime_ns for entry in path.iterdir()}
        write(root, 1)
        assert {entry.name: entry.stat().st_mtime_ns for entry in path.iterdir()} == before

    def test_a_damaged_one_is_replaced(self, root):
        path = write(root, 1)
        (path / "train_state.json").write_text("{}")
        write(root, 1)
        verify_checkpoint(path)
        assert [entry.name for entry in root.iterdir()] == [path.name]


class TestNoSpace:
    @pytest.mark.parametrize("number", range(2, 14))
    def test_a_full_disk_leaves_the_previous_checkpoint_and_no_rest(self, root, monkeypatch, number):
        write(root, 1)

        def full(name, method, args):
            if name.startswith("write"):
                args[0].write_bytes(b"part")
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(checkpoint, "_disk", FailingDisk(number, full))
        with pytest.raises(CheckpointError, match=r"step-00000002 could not be written.*No space left"):
            write(root, 2)
        assert [entry.name for entry in root.iterdir()] == [folder_name(1)]
        verify_checkpoint(root / folder_name(1))

    def test_space_is_checked_before_anything_is_written(self, root, monkeypatch):
        class Small(Disk):
            def free_bytes(self, path):
                return 1000

            def write_tensors(self, path, tensors):
                pytest.fail("wrote although there is no space")

        monkeypatch.setattr(checkpoint, "_disk", Small())
        with pytest.raises(CheckpointError, match=r"needs 1,0\d\d,\d\d\d bytes, 1,000 are free"):
            write(root, 1)
        assert not list(root.iterdir())


class TestRetention:
    def test_keeps_the_newest_and_every_milestone(self, root):
        for step, milestone in [(0, "period-0"), (1, None), (2, "period-1"), (3, None), (4, None)]:
            write(root, step, milestone=milestone)
        assert prune_checkpoints(root, keep=1) == [folder_name(1), folder_name(3)]
        assert [path.name for path in list_checkpoints(root)] == [folder_name(step) for step in (0, 2, 4)]

    def test_damaged_ones_do_not_count_as_kept_and_stay(self, root):
        for step in (1, 2, 3, 4, 5):
            write(root, step)
        (root / folder_name(5) / "model.safetensors").write_bytes(b"")
        (root / folder_name(3) / "train_state.json").write_text("{}")
        assert prune_checkpoints(root, keep=2) == [folder_name(1)]
        assert [path.name for path in list_checkpoints(root)] == [folder_name(step) for step in (2, 3, 4, 5)]

    def test_what_is_not_ours_is_left_alone(self, root):
        for step in (1, 2):
            write(root, step)
        (root / "step-final").mkdir()
        (root / "step-00000009").write_text("a file")
        (root / ".tmp-notes").write_text("mine")
        (root / ".tmp-step-00000003").mkdir()
        (root / "model.safetensors").write_text("")
        assert prune_checkpoints(root, keep=1) == [folder_name(1)]
        assert newest_checkpoint(root, report=pytest.fail) == root / folder_name(2)
        assert remove_stale(root) == []
        assert len(list(root.iterdir())) == 6

    def test_a_file_in_the_place_of_a_checkpoint_is_replaced(self, root):
        root.mkdir()
        (root / folder_name(1)).write_text("a file")
        verify_checkpoint(write(root, 1))
        assert [path.name for path in root.iterdir()] == [folder_name(1)]

    def test_one_that_cannot_be_deleted_is_said(self, root, monkeypatch):
        class Stubborn(Disk):
            def remove_folder(self, path):
                raise PermissionError(errno.EACCES, "Permission denied")

        for step in (1, 2):
            write(root, step)
        monkeypatch.setattr(checkpoint, "_disk", Stubborn())
        with pytest.raises(CheckpointError, match=r"step-00000001 is not kept and cannot be deleted: Permission"):
            prune_checkpoints(root, keep=1)
        with pytest.raises(CheckpointError, match=r"\.tmp-old-step-00000001-.* cannot be removed: Permission"):
            remove_stale(root)

    def test_stale_folders_are_removed(self, root):
        write(root, 1)
        stale = [".tmp-damaged-0123abcd", ".tmp-old-step-00000002-0123abcd", ".tmp-step-00000002-0123abcd"]
        for name in stale:
            (root / name).mkdir()
        assert remove_stale(root) == stale
        assert [entry.name for entry in root.iterdir()] == [folder_name(1)]


class TestWeights:
    def test_another_model_is_refused_with_names(self, root):
        model = nn.Linear(4, 3)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        foreign = {"weight": torch.zeros(3, 5), "scale": torch.zeros(3)}
        with pytest.raises(CheckpointError) as error:
            load_weights(model, foreign, where=root)
        message = str(error.value)
        assert "missing from the checkpoint: bias" in message
        assert "unknown to the model: scale" in message
        assert "weight: (3, 5), the model has (3, 4)" in message
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_the_same_model_is_loaded_exactly(self, root):
        source, target = nn.Linear(4, 3), nn.Linear(4, 3)
        load_weights(target, source.state_dict(), where=root)
        assert torch.equal(source.weight, target.weight)

    def test_another_tokenizer_is_refused(self, root):
        check_tokenizer(root, {"tokenizer_hash": "a" * 64}, "a" * 64)
        with pytest.raises(CheckpointError, match="tokenizer aaaaaaaaaaaaaaaa, the one in use is bbbb"):
            check_tokenizer(root, {"tokenizer_hash": "a" * 64}, "b" * 64)


def test_a_failed_write_of_any_kind_leaves_nothing(root):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_checkpoint(
            root / folder_name(1),
            tensors={},
            documents={"train_state.json": {"loss": float("nan")}},
            extra_files={},
            config_hash="c0ffee",
        )
    assert not list(root.iterdir())
