"""The lock of a campaign folder where ids mean other processes: another machine, an id used again."""

import fcntl
import json
import os
import socket
import subprocess
import sys

import pytest

from nested_lm.errors import CampaignError
from nested_lm.storage.lock import Process
from nested_lm_lab.campaign.lock import CampaignLock

HERE = socket.gethostname()


@pytest.fixture
def bystander():
    """A process that has nothing to do with campaigns."""
    child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    yield child
    child.kill()
    child.wait()


@pytest.fixture
def hold(tmp_path):
    """Holds the lock as somebody else, with this content."""
    descriptor = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)

    def hold(content: dict[str, object]) -> CampaignLock:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.pwrite(descriptor, json.dumps(content).encode(), 0)
        return CampaignLock(tmp_path, say=print, orphan_timeout_s=0.2)

    yield hold
    os.close(descriptor)


def holder(host, pid, *, started, steps):
    process = {"pid": pid, "started": started}
    return {"host": host, "process": process, "activity": "campaign", "since": "2026-01-01", "steps": steps}


def test_processes_of_another_machine_are_named_and_not_signalled(hold, bystander):
    steps = {"hope": {"pid": bystander.pid, "started": None}}
    lock = hold(holder("node7", 4_000_000, started=5, steps=steps))
    message = rf"(?s)in use by process 4000000 on machine node7 .*hope \(process {bystander.pid}\).*kill.* on node7"
    with pytest.raises(CampaignError, match=message), lock:
        pass
    assert bystander.poll() is None


@pytest.mark.skipif(sys.platform != "linux", reason="needs the time a process started")
def test_an_id_that_was_used_again_is_not_signalled(hold, bystander):
    steps = {"hope": {"pid": bystander.pid, "started": 1}}
    lock = hold(holder(HERE, os.getpid(), started=1, steps=steps))
    with pytest.raises(CampaignError, match=r"of a killed campaign still runs a process it started"), lock:
        pass
    assert bystander.poll() is None


def test_a_process_is_known_by_its_id_and_start(bystander):
    assert Process.of(bystander.pid).is_alive()
    assert Process(bystander.pid, None).is_alive()
    bystander.kill()
    bystander.wait()
    assert not Process(bystander.pid, None).is_alive()


@pytest.mark.parametrize("content", [{"campaign_pid": 1, "steps": {"hope": 1}}, {}, {"host": HERE, "steps": []}])
def test_a_holder_that_does_not_say_who_it_is_is_not_signalled(hold, content):
    with pytest.raises(CampaignError, match="in use by a process that did not say which"), hold(content):
        pass


def test_a_lock_that_cannot_be_opened_or_written_says_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "lock").mkdir()
    with pytest.raises(CampaignError, match=r"(?s)lock cannot be used: Is a directory.*start again"):
        CampaignLock(tmp_path, say=print).__enter__()
    (tmp_path / "lock").rmdir()

    def full(*_):
        raise OSError(28, "No space left on device")

    with CampaignLock(tmp_path, say=print) as lock:
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(CampaignError, match=r"(?s)lock cannot be used: No space left.*Free some space"):
            lock.note_step("hope", os.getpid())
