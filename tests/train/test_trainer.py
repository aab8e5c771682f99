import json
import math
from pathlib import Path

import pytest
import torch
import yaml

from nested_lm.checkpoint import list_checkpoints, load_model, newest_checkpoint, verify_checkpoint
from nested_lm.config.load import training_hash
from nested_lm.data.loader import PackedLoader
from nested_lm.data.shards import TokenDataset
from nested_lm.errors import CheckpointError, ConfigError, DataError
from nested_lm.nn.model import LanguageModel, token_losses
from nested_lm.ops.memory.cpu import library as cpu_library
from nested_lm.train.run_folder import new_identity
from nested_lm.train.strategies import base as strategy_module
from nested_lm.train.strategies.base import choose_device
from nested_lm.train.trainer import train

STEPS, STEP_TOKENS = 10, 32


class TestLog:
    def test_every_step_has_one_record_with_the_fields_of_the_contract(self, make_config, records):
        summary = train(make_config("hope"))
        steps = records(summary.folder, "step")
        assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
        always = {
            "tokens",
            "loss",
            "rate",
            "grad_norm",
            "tokens_per_s",
            "seconds",
            "memory_mb",
            "scored_tokens",
        }
        for row in steps:
            assert always <= row.keys()
            assert row["tokens"] == row["step"] * STEP_TOKENS
            assert 0 < row["scored_tokens"] <= STEP_TOKENS
            assert ("layer0/rate" in row) == ("update_norm/matrix" in row) == (row["step"] % 2 == 0)
        assert [row["step"] for row in steps if "update_norm/level1/matrix" in row] == [4, 8]
        memories = {name for name in steps[3] if name.startswith("update_norm/memory/")}
        assert memories == {f"update_norm/memory/{name}" for name in ("k", "v", "eta", "alpha", "memory")}
        seconds = [row["seconds"] for row in steps]
        assert seconds == sorted(seconds)

    def test_rates_follow_the_schedule(self, make_config, records):
        rows = records(train(make_config()).folder, "step")
        assert rows[0]["rate"] == pytest.approx(0.5e-2)  # half of the warm-up
        assert rows[1]["rate"] == pytest.approx(1e-2)
        assert rows[-1]["rate"] == pytest.approx(0.1e-2)  # ends at `final` with the last step

    def test_evaluations_checkpoints_and_the_end(self, make_config, records):
        summary = train(make_config())
        assert [row["step"] for row in records(summary.folder, "eval")] == [5, 10]
        assert [row["step"] for row in records(summary.folder, "checkpoint")] == [3, 6, 9, 10]
        assert [path.name for path in list_checkpoints(summary.folder / "checkpoints")] == [
            "step-00000009",
            "step-00000010",
        ]
        assert records(summary.folder)[-1]["event"] == "done"

    def test_the_first_loss_is_the_models_own_weighted_by_tokens(self, make_config, records):
        """Micro-batches hold different numbers of scored tokens; the step's loss weighs every token alike."""
        config = make_config("hope")
        model = LanguageModel(config.model)
        model.initialise(config.seed)
        loader = PackedLoader(
            TokenDataset.open(Path(config.data.output_dir), "train"),
            context_length=16,
            batch_size=1,
            seed=config.seed,
            align=8,
        )
        total, scored = 0.0, 0
        for batch in (loader.next(), loader.next()):
            losses = token_losses(model(batch.inputs, resets=batch.resets).logits, batch.targets)
            total += losses.sum().item()
            scored += int((batch.targets != -100).sum())
        first = records(train(config).folder, "step")[0]
        assert first["scored_tokens"] == scored
        assert first["loss"] == pytest.approx(total / scored, rel=1e-6)


class TestRunFolder:
    def test_identity_and_resolved_configuration(self, make_config):
        config = make_config()
        summary = train(config)
        identity = json.loads((summary.folder / "run.json").read_text())
        dataset = TokenDataset.open(Path(config.data.output_dir), "train")
        assert identity["config_hash"] == training_hash(config)
        assert (identity["data_hash"], identity["tokenizer_hash"]) == (
            dataset.data_hash,
            dataset.tokenizer_hash,
        )
        assert (identity["seed"], identity["device"], identity["name"]) == (3, "cpu", "tiny")
        assert identity["parameters"] == sum(p.numel() for p in LanguageModel(config.model).parameters())
        assert {"torch", "python", "nested-lm"} <= identity["versions"].keys()
        resolved = yaml.safe_load((summary.folder / "config.resolved.yaml").read_text())
        assert resolved == config.model_dump(mode="json")

    @pytest.mark.parametrize(("backend", "compiler"), [("auto", True), ("torch", True), ("auto", False)])
    def test_the_identity_names_the_compiler_of_memories_that_run_in_c(
        self, make_config, monkeypatch, backend, compiler
    ):
        monkeypatch.setattr(cpu_library, "reason_missing", lambda: None if compiler else "there is no C compiler")
        monkeypatch.setattr(cpu_library, "compiler_version", lambda: "cc 1.0")
        model = make_config("hope").model
        mixer = model.mixer.model_copy(update={"backend": backend})
        config = make_config("hope").model_copy(update={"model": model.model_copy(update={"mixer": mixer})})
        identity = new_identity(config, data_hash=None, tokenizer_hash="", device="cpu", parameters=1)
        assert identity["versions"].get("c_compiler") == ("cc 1.0" if backend == "auto" and compiler else None)
        other = new_identity(config, data_hash=None, tokenizer_hash="", device="cuda:0", parameters=1)
        assert "c_compiler" not in other["versions"]

    def test_other_evaluation_settings_are_the_same_training(self, make_config):
        config = make_config()
        folder = train(config).folder
        before = (folder / "metrics.jsonl").read_bytes()
        changed = config.eval.model_copy(update={"batch_size": config.eval.batch_size + 1})
        assert training_hash(config.model_copy(update={"eval": changed})) == training_hash(config)
        train(config.model_copy(update={"eval": changed}))
        assert (folder / "metrics.jsonl").read_bytes() == before

    def test_the_checkpoint_holds_all_that_evaluation_needs(self, make_config):
        config = make_config("hope")
        loaded = load_model(train(config).checkpoint, device="cpu")
        assert loaded.config == config
        assert (loaded.step, loaded.tokens, loaded.milestone) == (10, 320, None)
        assert loaded.identity["run_id"].startswith("tiny-")
        assert not loaded.model.training
        assert loaded.tokenizer.hash == loaded.identity["tokenizer_hash"]

    def test_a_checkpoint_with_another_tokenizer_is_refused(self, make_config):
        path = train(make_config()).checkpoint
        with pytest.raises(CheckpointError, match="the one in use is ffff"):
            load_model(path, device="cpu", tokenizer_hash="f" * 64)

    def test_an_unwritable_folder_is_a_clear_error(self, make_config, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(ConfigError, match="cannot be written"):
            train(make_config(folder="file/run"))


class TestLearning:
    @pytest.mark.parametrize("model", ["hope", "transformer"])
    def test_the_loss_falls(self, make_config, records, model):
        config = make_config(
            model,
            budget_tokens=STEP_TOKENS * 30,
            evaluate_every_tokens=STEP_TOKENS * 30,
            checkpoints={"every_tokens": STEP_TOKENS * 30},
        )
        folder = train(config).folder
        losses = [row["loss"] for row in records(folder, "step")]
        assert losses[0] == pytest.approx(math.log(320), abs=0.5)
        assert sum(losses[-3:]) / 3 < losses[0] - 1.5

    def test_accumulation_gives_the_same_training(self, make_config, records):
        """One batch of two rows, or two of one: the same loss and gradient but for rounding."""
        whole = train(make_config(folder="a", batch_size=2, accumulation=1))
        parts = train(make_config(folder="b", batch_size=1, accumulation=2))
        for one, other in zip(records(whole.folder, "step"), records(parts.folder, "step"), strict=True):
            assert one["loss"] == pytest.approx(other["loss"], rel=2e-4)  # float32, ten steps of Adam
            assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=2e-3)

    @pytest.mark.parametrize("recompute", ["chunk", "block"])
    def test_recomputing_changes_nothing(self, make_config, records, recompute):
        plain = train(make_config("hope", folder="a", budget_tokens=3 * STEP_TOKENS))
        other = train(make_config("hope", folder="b", budget_tokens=3 * STEP_TOKENS, recompute=recompute))
        for one, two in zip(records(plain.folder, "step"), records(other.folder, "step"), strict=True):
            assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)

    def test_bfloat16_trains_near_float32(self, make_config, records):
        plain = train(make_config("hope", folder="a", budget_tokens=4 * STEP_TOKENS))
        half = train(make_config("hope", folder="b", budget_tokens=4 * STEP_TOKENS, precision="bfloat16"))
        for one, two in zip(records(plain.folder, "step"), records(half.folder, "step"), strict=True):
            assert one["loss"] == pytest.approx(two["loss"], rel=2e-2)  # 8 bits of mantissa
        weights = load_model(half.checkpoint, device="cpu").model.state_dict()
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}

    def test_gradients_are_clipped(self, make_config, monkeypatch):
        seen = []
        original = strategy_module.SingleDevice.clip

        def clip(self, parameters, max_norm, *, norm):
            parameters = list(parameters)
            original(self, parameters, max_norm, norm=norm)
            seen.append((norm.item(), self.gradient_norm(parameters).item()))

        monkeypatch.setattr(strategy_module.SingleDevice, "clip", clip)
        train(make_config(clip_norm=0.25))
        assert len(seen) == STEPS
        assert any(before > 0.25 for before, _ in seen)
        assert all(after == pytest.approx(min(before, 0.25), rel=1e-4) for before, after in seen)

    def test_the_same_seed_gives_the_same_run_and_another_does_not(self, make_config, final_bytes):
        folders = [
            train(make_config(folder=name, seed=seed)).folder for name, seed in zip("abc", (1, 1, 2), strict=True)
        ]
        first, second, third = map(final_bytes, folders)
        assert first == second
        assert first["model"] != third["model"]


class TestChronological:
    def test_periods_follow_each_other_and_every_border_is_kept(self, make_config, records, monkeypatch):
        seen = []
        original = PackedLoader.next

        def next_batch(self):
            seen.append(self.state_dict()["periods"])
            return original(self)

        monkeypatch.setattr(PackedLoader, "next", next_batch)
        config = make_config(
            stream={"kind": "chronological", "periods": 3}, checkpoints={"every_tokens": 32, "keep": 1}
        )
        summary = train(config)
        assert summary.step == 9  # three steps each; the tenth would be one more for a single period
        paths = list_checkpoints(summary.folder / "checkpoints")
        milestones = {int(path.name[5:]): verify_checkpoint(path)["milestone"] for path in paths}
        # Retention keeps one ordinary checkpoint and every border.
        assert {step: name for step, name in milestones.items() if name} == {
            0: "period-0",
            3: "period-1",
            6: "period-2",
            9: "period-3",
        }
        groups = [seen[index] for index in (0, 6, 12)]
        assert [tuple(group) for group in seen] == [tuple(group) for group in groups for _ in range(6)]
        in_order = [period for group in groups for period in group]
        assert in_order == sorted(in_order)
        assert load_model(paths[0], device="cpu").milestone == "period-0"
        assert records(summary.folder, "checkpoint")[0]["milestone"] == "period-0"

    def test_resumes_in_the_middle_of_a_period(self, make_config, final_bytes, comparable, monkeypatch):
        settings = {"stream": {"kind": "chronological", "periods": 3}}
        whole, config = make_config(folder="a", **settings), make_config(folder="b", **settings)
        train(whole)
        train(config)
        # As if it had been killed after step 5, when checkpoint 3 was the newest.
        for path in list_checkpoints(Path(config.output_dir) / "checkpoints"):
            if int(path.name[5:]) > 3:
                for file in path.iterdir():
                    file.unlink()
                path.rmdir()
        assert newest_checkpoint(Path(config.output_dir) / "checkpoints").name == "step-00000003"
        train(config)
        assert final_bytes(config.output_dir) == final_bytes(whole.output_dir)
        assert comparable(config.output_dir) == comparable(whole.output_dir)

    def test_too_many_periods_are_a_data_error(self, make_config):
        with pytest.raises(DataError, match="9 are asked for"):
            train(make_config(stream={"kind": "chronological", "periods": 9}))


class TestRefusals:
    def test_a_device_this_machine_lacks(self, make_config, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(ConfigError, match=r"train\.device is cuda, but no CUDA device.*auto, cpu"):
            train(make_config(device="cuda"))
        assert choose_device("auto") == torch.device("cpu")

    def test_cuda_is_used_where_it_is(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert choose_device("auto") == choose_device("cuda") == torch.device("cuda")
        assert choose_device("cpu") == torch.device("cpu")

    def test_a_vocabulary_that_is_too_small(self, make_config):
        config = make_config()
        small = config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": 300})})
        with pytest.raises(
            ConfigError, match=r"model\.vocab_size 300 is smaller than the 320 tokens of .*vocab_size=320"
        ):
            train(small)

    def test_a_missing_data_set(self, make_config, tmp_path):
        config = make_config()
        data = config.data.model_copy(update={"output_dir": str(tmp_path / "nowhere")})
        with pytest.raises(DataError, match="nowhere"):
            train(config.model_copy(update={"data": data}))


def test_evaluators_add_to_the_record_and_do_not_disturb_training(make_config, records, final_bytes):
    def evaluator(model, step):
        torch.rand(1)  # draws from the generator training uses
        return {"recall": step / 10}

    plain = train(make_config(folder="a"))
    measured = train(make_config(folder="b"), evaluators=[evaluator])
    assert [row["recall"] for row in records(measured.folder, "eval")] == [0.5, 1.0]
    assert final_bytes(plain.folder) == final_bytes(measured.folder)
