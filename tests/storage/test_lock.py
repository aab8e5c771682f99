"""One owner a folder or file, who is named; nothing is left behind."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from nested_lm.errors import ConfigError, InUseError
from nested_lm.storage import lock as lock_module
from nested_lm.storage.lock import own_file, own_folder

HOLD = """
import sys, time
from pathlib import Path
from nested_lm.storage.lock import own_folder
with own_folder(Path(sys.argv[1]), activity="train"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    """A process that owns `tmp_path/run`."""
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"held\n"
    yield child
    child.kill()
    child.wait()
    child.stdout.close()


def test_a_second_owner_is_refused_with_who_holds_it(tmp_path, other):
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    message = rf"run is in use by process {other.pid} on machine {socket.gethostname()} \(`train`, since 20\d\d-.*kill"
    with pytest.raises(InUseError, match=f"(?s){message}"), own_folder(tmp_path / "run", activity="train"):
        pass
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()} == before


def test_a_killed_owner_leaves_no_lock(tmp_path, other):
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert (tmp_path / "run" / "lock").exists()
    with own_folder(tmp_path / "run", activity="train") as lock:
        assert lock.holder().process.pid == os.getpid()


def test_leaving_removes_the_lock_and_the_folders_it_made_for_nothing(tmp_path):
    with own_folder(tmp_path / "a" / "b", activity="train"):
        (tmp_path / "a" / "kept").write_text("")
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "kept"]


def test_files_are_owned_one_by_one(tmp_path):
    one, other = own_file(tmp_path / "a.json", activity="eval"), own_file(tmp_path / "b.json", activity="eval")
    with one, other, pytest.raises(InUseError, match=r"a\.json is in use"):
        own_file(tmp_path / "a.json", activity="eval").__enter__()
    assert not list(tmp_path.iterdir())


def test_an_owner_that_removed_its_file_meanwhile_is_not_followed(tmp_path):
    """The name means another file now: a lock on the old one would be worth nothing."""
    first = own_folder(tmp_path, activity="train")
    first.__enter__()
    stale = os.open(first.path, os.O_RDWR)
    first.__exit__(None, None, None)
    with own_folder(tmp_path, activity="train") as second:
        assert not os.path.samestat(os.fstat(stale), os.fstat(second.descriptor))
    os.close(stale)


@pytest.mark.parametrize("content", ["", "[]", '{"host": 1}', "\udc80", '{"steps": {"a": 1}}', "[" * 100_000])
def test_a_holder_that_cannot_be_read_is_refused_all_the_same(tmp_path, content, monkeypatch):
    monkeypatch.setattr(lock_module, "_PATIENCE_S", 0.0)
    with own_folder(tmp_path, activity="train") as held:
        held.path.write_bytes(content.encode(errors="surrogateescape"))
        with pytest.raises(InUseError, match="a process that did not say which"), own_folder(tmp_path, activity="t"):
            pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EIO])
def test_a_file_system_without_locks_is_an_error_of_ours(tmp_path, monkeypatch, number):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lock_module, "lock_descriptor", refuse)
    with pytest.raises(ConfigError, match=r"(?s)cannot be written.*file system that has locks"):
        own_folder(tmp_path / "run", activity="train").__enter__()


def test_the_lock_file_is_never_a_link_of_somebody_else(tmp_path):
    (tmp_path / "elsewhere").write_text("precious")
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError):
        own_folder(tmp_path, activity="train").__enter__()
    assert (tmp_path / "elsewhere").read_text() == "precious"


def test_the_holder_is_json(tmp_path):
    with own_folder(tmp_path, activity="train") as lock:
        assert json.loads(lock.path.read_text())["process"]["pid"] == os.getpid()
