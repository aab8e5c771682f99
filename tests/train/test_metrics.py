import builtins
import json
import sys
from typing import ClassVar

import pytest

from nested_lm.config.train import Logging
from nested_lm.errors import ConfigError, DataError
from nested_lm.train import metrics
from nested_lm.train.metrics import WANDB_LINK, MetricsLog, TensorBoardSink, WandbSink, open_sinks, read_records
from nested_lm.train.trainer import train

STEP = {"event": "step", "step": 1, "tokens": 8, "loss": 1.5, "layer0/rate": None}


class TestLog:
    def write(self, path, steps):
        log = MetricsLog(path, resume_step=-1)
        for step in steps:
            log.write({"event": "step", "step": step, "tokens": 8 * step, "loss": 0.1 * step})
        log.write({"event": "eval", "step": 2, "tokens": 16})
        log.close()

    def test_lines_are_there_as_soon_as_they_are_written(self, tmp_path):
        log = MetricsLog(tmp_path / "m.jsonl", resume_step=-1)
        log.write(STEP)
        assert read_records(tmp_path / "m.jsonl") == [STEP]
        log.close()

    def test_numbers_come_back_bit_for_bit(self, tmp_path):
        self.write(tmp_path / "m.jsonl", range(1, 4))
        assert [row["loss"] for row in read_records(tmp_path / "m.jsonl")[:3]] == [0.1 * s for s in (1, 2, 3)]

    def test_resuming_cuts_what_will_be_written_again(self, tmp_path):
        path = tmp_path / "m.jsonl"
        self.write(path, range(1, 6))
        with path.open("a") as file:
            file.write('{"event": "step", "st')  # killed in the middle of a line
        log = MetricsLog(path, resume_step=3)
        assert log.evaluated_steps == {2}
        log.write({"event": "step", "step": 4, "tokens": 32, "loss": 1.0})
        log.close()
        assert [row["step"] for row in read_records(path) if row["event"] == "step"] == [1, 2, 3, 4]

    def test_a_new_run_starts_an_empty_log(self, tmp_path):
        path = tmp_path / "m.jsonl"
        self.write(path, [0, 1])
        MetricsLog(path, resume_step=-1).close()
        assert read_records(path) == []

    def test_nan_cannot_enter_the_log(self, tmp_path):
        log = MetricsLog(tmp_path / "m.jsonl", resume_step=-1)
        with pytest.raises(ValueError, match="not JSON compliant"):
            log.write({"event": "step", "step": 1, "loss": float("nan")})
        log.close()
        assert read_records(tmp_path / "m.jsonl") == []

    @pytest.mark.parametrize("line", ["{", "[1]", '{"event": "step"}', "3", "text"])
    def test_a_damaged_line_is_named(self, tmp_path, line):
        path = tmp_path / "m.jsonl"
        path.write_text(f"{json.dumps(STEP)}\n{line}\n{json.dumps(STEP)}\n")
        with pytest.raises(DataError, match=r"m\.jsonl:2 is not a metrics record"):
            MetricsLog(path, resume_step=1)

    @pytest.mark.parametrize(
        "change",
        [
            {"step": "1"},
            {"step": True},
            {"step": -1},
            {"event": 3},
            {"tokens": 1.5},
            {"loss": None},
            {"loss": "low"},
            {"layer0/rate": [1]},
        ],
    )
    def test_wrong_types_are_named(self, tmp_path, change):
        path = tmp_path / "m.jsonl"
        path.write_text(json.dumps(STEP | change) + "\n")
        with pytest.raises(DataError, match=rf"m\.jsonl:1 is not a metrics record.*{next(iter(change))}"):
            read_records(path)

    def test_every_bit_flip_is_found(self, tmp_path):
        path = tmp_path / "m.jsonl"
        self.write(path, range(1, 3))
        whole, records = path.read_bytes(), read_records(path)
        for position in range(8 * len(whole)):
            changed = bytearray(whole)
            changed[position // 8] ^= 1 << position % 8
            path.write_bytes(changed)
            with pytest.raises(DataError, match="is not a metrics record"):
                read_records(path)
        path.write_bytes(whole)
        assert read_records(path) == records

    def test_the_log_of_an_earlier_version_is_read(self, tmp_path):
        path = tmp_path / "m.jsonl"
        path.write_text(json.dumps(STEP) + "\n")
        assert read_records(path) == [STEP]
        MetricsLog(path, resume_step=1).close()
        assert b"seal" in path.read_bytes()
        assert read_records(path) == [STEP]

    def test_a_file_that_cannot_be_read_is_a_data_error(self, tmp_path):
        (tmp_path / "m.jsonl").mkdir()
        with pytest.raises(DataError, match="cannot be read: Is a directory"):
            read_records(tmp_path / "m.jsonl")


class TestTensorBoard:
    def test_scalars_are_written_and_resumed_steps_replaced(self, tmp_path):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        first = TensorBoardSink(tmp_path, resume_step=-1)
        for step in (1, 2, 3):
            first.write({**STEP, "step": step, "loss": float(step)})
        first.close()
        second = TensorBoardSink(tmp_path, resume_step=2)
        second.write({**STEP, "step": 3, "loss": 30.0})
        second.write({"event": "done", "step": 3})
        second.close()
        events = EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        assert events.Tags()["scalars"] == ["step/tokens", "step/loss"]
        assert [(event.step, event.value) for event in events.Scalars("step/loss")] == [
            (1, 1),
            (2, 2),
            (3, 30),
        ]


class FakeWandb:
    """Records what would be sent."""

    def __init__(self, api_key=None, url=None):
        self.api = type("Api", (), {"api_key": api_key})()
        self.url = url
        self.logged, self.finished = [], 0

    def Settings(self, **settings):  # noqa: N802  the package's own name
        return settings

    def init(self, **arguments):
        self.arguments = arguments
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


class TestWandb:
    IDENTITY: ClassVar = {"run_id": "tiny-1", "name": "tiny"}

    @pytest.fixture(autouse=True)
    def no_key(self, monkeypatch):
        monkeypatch.delenv("WANDB_API_KEY", raising=False)
        monkeypatch.delenv("WANDB_MODE", raising=False)

    def open(self, monkeypatch, tmp_path, fake):
        monkeypatch.setitem(sys.modules, "wandb", fake)
        return WandbSink(tmp_path, project="p", identity=self.IDENTITY, config={"seed": 1})

    def test_goes_on_under_the_run_id_and_sends_numbers_only(self, monkeypatch, tmp_path):
        fake = FakeWandb()
        sink = self.open(monkeypatch, tmp_path, fake)
        sink.write(STEP)
        sink.write({"event": "eval", "step": 1, "validation_bpb": 2.0})
        sink.write({"event": "stop", "step": 1, "signal": "SIGTERM"})
        sink.close()
        assert (fake.arguments["id"], fake.arguments["resume"], fake.arguments["mode"]) == (
            "tiny-1",
            "allow",
            "offline",
        )
        assert fake.logged == [(1, {"tokens": 8, "loss": 1.5}), (1, {"eval/validation_bpb": 2.0})]
        assert fake.finished == 1

    @pytest.mark.parametrize("source", ["environment", "netrc"])
    def test_is_online_with_a_key_which_is_never_sent(self, monkeypatch, tmp_path, source):
        if source == "environment":
            monkeypatch.setenv("WANDB_API_KEY", "s3cret-key-of-mine")
        fake = FakeWandb(api_key="s3cret-key-of-mine" if source == "netrc" else None)
        self.open(monkeypatch, tmp_path, fake)
        assert fake.arguments["mode"] == "online"
        assert "s3cret" not in repr(fake.arguments)

    def test_keeps_the_address_of_the_curves_where_there_is_one(self, monkeypatch, tmp_path):
        self.open(monkeypatch, tmp_path, FakeWandb())
        assert not (tmp_path / WANDB_LINK).exists()  # offline
        self.open(monkeypatch, tmp_path, FakeWandb(url="https://wandb.ai/us/p/runs/tiny-1"))
        assert json.loads((tmp_path / WANDB_LINK).read_text()) == {"url": "https://wandb.ai/us/p/runs/tiny-1"}

    @pytest.mark.slow
    def test_the_real_package_writes_an_offline_run(self, tmp_path, monkeypatch):
        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.setenv("MY_SECRET_TOKEN", "s3cret-token-of-mine")
        sink = WandbSink(tmp_path, project="p", identity=self.IDENTITY, config={"seed": 1})
        sink.write(STEP)
        sink.close()
        files = [path for path in (tmp_path / "wandb").rglob("*") if path.is_file()]
        assert any(path.suffix == ".wandb" and "tiny-1" in path.name for path in files)
        assert not any(b"s3cret" in path.read_bytes() for path in files)


class TestMissingPackages:
    @pytest.mark.parametrize(
        ("logging", "package", "extra"),
        [
            (Logging(tensorboard=True), "torch.utils.tensorboard", "tensorboard"),
            (Logging(wandb_project="p"), "wandb", "wandb"),
        ],
    )
    def test_the_error_names_the_extra(self, monkeypatch, tmp_path, logging, package, extra):
        def import_module(name):
            raise ImportError(f"No module named {name!r}", name=extra)

        monkeypatch.setattr(metrics.importlib, "import_module", import_module)
        with pytest.raises(ConfigError, match=rf"{extra} is not installed; run `pip install .* -e '\.\[{extra}\]'`"):
            open_sinks(logging, tmp_path, resume_step=-1, identity=TestWandb.IDENTITY, resolved={})

    def test_nothing_is_imported_unless_asked_for(self, monkeypatch, tmp_path, make_config):
        original = builtins.__import__

        def guarded(name, *args, **kwargs):
            assert not name.startswith(("wandb", "tensorboard", "matplotlib")), name
            return original(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", guarded)
        assert open_sinks(Logging(), tmp_path, resume_step=-1, identity={}, resolved={}) == []


def test_a_run_logs_to_tensorboard_when_asked(make_config):
    summary = train(make_config(budget_tokens=64, logging={"tensorboard": True, "every_steps": 1}))
    assert list((summary.folder / "tensorboard").glob("events.*"))
