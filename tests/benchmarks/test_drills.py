"""Every drill, a few trials each: nothing fails, and a broken promise would be seen."""

import json

import pytest
from benchmarks.drills import damage, training
from benchmarks.drills.registry import DRILLS

from nested_lm.train import trainer

QUICK = {"kills": 2, "crash_points": 6, "full_disk": 6, "second_starts": 2, "unreadable": 2, "flips": 300}

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.mark.parametrize("name", DRILLS)
def test_a_few_trials(tmp_path, name):
    outcome = DRILLS[name].run(tmp_path, QUICK.get(name, 300))
    assert outcome.failures == []
    assert outcome.tried >= QUICK.get(name, 300)


def test_without_the_lock_the_second_start_is_not_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "_enter", lambda held, lock: None)
    assert training.second_starts(tmp_path, 2).failures


def test_an_unsealed_log_lets_flips_through(tmp_path, monkeypatch):
    monkeypatch.setattr("nested_lm.train.metrics.seal", lambda record: json.dumps(record).encode() + b"\n")
    assert any("metrics.jsonl" in failure for failure in damage.flips(tmp_path, 400).failures)
