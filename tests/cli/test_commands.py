"""The command line: arguments reach the stages, errors are printed once, exit codes say what happened.

The stages are stubs; they are tested in their own folders.
"""

import importlib.metadata
import resource
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from typer.testing import CliRunner

from nested_lm.cli.main import app
from nested_lm.errors import CheckpointError, DataError

MAX_HELP_SECONDS = 1.0  # of processor time: what the README promises
HEAVY = {"torch", "numpy", "hydra", "omegaconf", "pydantic", "tokenizers", "wandb", "matplotlib"}


@pytest.fixture
def stub(monkeypatch):
    """Put a module of stubs in the place of a stage."""

    def install(name: str, **functions) -> None:
        module = ModuleType(name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)

    return install


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def finished(exit_code=0):
    return SimpleNamespace(exit_code=exit_code)


def test_help_answers_at_once_and_imports_nothing_heavy():
    code = "from nested_lm.cli.main import main; main()"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code, "--help"], capture_output=True, text=True, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert all(verb in done.stdout for verb in ("data", "train", "eval", "generate", "campaign", "report", "doctor"))
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "typer" in imported
    assert not imported & HEAVY
    assert (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime) < MAX_HELP_SECONDS


class TestArguments:
    def test_version(self, run):
        assert run("--version").stdout.strip() == f"nested-lm {importlib.metadata.version('nested-lm')}"

    def test_unknown_verb_names_the_nearest(self, run):
        result = run("trian", "hope/demo")
        assert result.exit_code == 2
        assert "Did you mean 'train'?" in result.stderr

    def test_data(self, run, stub):
        seen = []
        stub(
            "nested_lm.data.pipeline",
            build=lambda config, *, report: seen.append(config) or report("split") or Path("there"),
        )
        result = run("data", "configs/data/demo.yaml", "period_years=50", "name=mine")
        assert (seen[0].period_years, seen[0].name) == (50, "mine")
        assert result.stdout == "split\ndata set in there\n"
        assert result.exit_code == 0

    @pytest.mark.parametrize(("arguments", "resume"), [([], "auto"), (["--resume", "never"], "never")])
    def test_train(self, run, stub, arguments, resume):
        seen = []
        stub(
            "nested_lm.train.trainer",
            train=lambda config, *, resume: seen.append((config, resume)) or finished(),
        )
        result = run("train", "hope/demo", "seed=3", *arguments, "train.clip_norm=0.5")
        assert result.exit_code == 0, result.output
        [(config, found)] = seen
        assert (config.seed, config.train.clip_norm, found) == (3, 0.5, resume)

    def test_train_in_a_sweep(self, run, stub):
        seen = []
        stub(
            "nested_lm.train.trainer",
            train=lambda config, *, resume: seen.append((config, resume)) or finished(),
        )
        result = run("train", "hope/demo", "-m", "seed=1,2", "output_dir=out", "--resume", "never")
        assert result.exit_code == 0, result.output
        assert [(config.seed, config.output_dir, resume) for config, resume in seen] == [
            (1, "out/sweep/seed=1", "never"),
            (2, "out/sweep/seed=2", "never"),
        ]

    def test_dry_run_says_what_would_be_trained_and_writes_nothing(self, run, stub, tmp_path):
        stub("nested_lm.nn.sizing", count_parameters=lambda model: {"mixer": 2000, "norms": 34, "total": 2034})
        stub("nested_lm.train.trainer")
        batch = ["train.context_length=256", "train.batch_size=16", "train.budget_tokens=819_200"]
        schedule = ["train.schedule.warmup_tokens=40_000", "train.schedule.decay_tokens=500_000"]
        clocks = ["model.channel.levels.0.period_tokens=4096", "model.channel.levels.1.period_tokens=8192"]
        result = run("train", "hope/demo", "--dry-run", *batch, *schedule, *clocks, "name=small")
        assert result.exit_code == 0, result.output
        assert "2,034: mixer 2,000, norms 34" in result.stdout
        assert "819,200 tokens = 200 steps of 4,096" in result.stdout
        assert "warm-up 40,000, constant 279,200, decay 500,000" in result.stdout
        assert "artifacts/runs/small" in result.stdout
        assert list(tmp_path.iterdir()) == []

    def test_dry_run_of_a_sweep_is_refused(self, run):
        result = run("train", "hope/demo", "-m", "--dry-run", "seed=1,2")
        assert result.exit_code == 2
        assert "describes one run" in result.stderr

    def test_eval(self, run, stub, tmp_path):
        seen = []
        stub(
            "nested_lm_lab.evaluation.run",
            evaluate_run=lambda *given, settings, device: seen.append((*given, device)),
        )
        assert run("eval", tmp_path).exit_code == 0
        assert run("eval", tmp_path, "--tasks", "language_modelling, passkey", "--device", "cpu").exit_code == 0
        assert seen == [(tmp_path, None, None), (tmp_path, ("language_modelling", "passkey"), "cpu")]

    def test_presets(self, run):
        listed = run("presets").stdout
        assert "hope/demo " in listed
        assert "model/hope_demo" not in listed  # a part, which no verb takes by itself
        baselines = run("presets", "baselines").stdout.splitlines()
        assert all(line.startswith("baselines/") and ": hope/" in line for line in baselines)
        refused = run("presets", "nothing")
        assert refused.exit_code == 2
        assert "choose one of ablations, baselines, campaign" in refused.stderr

    def test_eval_of_nothing(self, run, tmp_path):
        assert "not a folder" in run("eval", tmp_path / "absent").stderr
        assert "names no task" in run("eval", tmp_path, "--tasks", ",").stderr

    def test_campaign(self, run, stub):
        seen = []
        stub(
            "nested_lm_lab.campaign.plan",
            run_campaign=lambda config, *, dry_run: seen.append((config.name, dry_run)),
        )
        assert run("campaign", "configs/campaign/demo.yaml", "name=mine").exit_code == 0
        assert run("campaign", "campaign/demo", "--dry-run").exit_code == 0
        assert seen == [("mine", False), ("demo", True)]

    def test_report(self, run, stub):
        seen = []
        stub("nested_lm_lab.report.render", render_campaign=seen.append)
        assert run("report", "artifacts/demo").exit_code == 0
        assert seen == [Path("artifacts/demo")]


class TestGenerate:
    @pytest.fixture
    def seen(self, stub):
        """Stub of a model that writes `ab`."""
        calls = {}

        def load_model(path, *, device):
            calls.update(path=path, device=device)
            return "loaded"

        class Trained:
            @classmethod
            def of(cls, loaded):
                assert loaded == "loaded"
                return cls()

            def generate(self, text, **options):
                calls.update(options, text=text)
                return "ab"

        stub(
            "nested_lm.checkpoint",
            load_model=load_model,
            find_checkpoint=lambda source, *, report: source / "step-2",
        )
        stub("nested_lm.reading.trained", TrainedModel=Trained, choose_device=lambda device: device)
        return calls

    def test_prompt_is_continued_to_the_end_of_the_document(self, run, seen, tmp_path):
        options = ["--temperature", 0.5, "--top-k", 3, "--seed", 9, "--max-new-tokens", 4, "--device", "cpu"]
        result = run("generate", tmp_path, "--prompt", "[b]Hi", *options)
        assert result.stdout == "[b]Hiab\n"
        assert seen == {
            "path": tmp_path / "step-2",
            "device": "cpu",
            "text": "[b]Hi",
            "max_new_tokens": 4,
            "temperature": 0.5,
            "top_p": 0.95,
            "top_k": 3,
            "seed": 9,
            "remember": False,
        }

    def test_folder_without_checkpoint(self, run, tmp_path):
        result = run("generate", tmp_path, "--prompt", "Hi")
        assert result.exit_code == 2
        assert "neither a checkpoint nor a run folder" in result.stderr

    @pytest.mark.parametrize("option", [("--top-p", 0), ("--top-p", 1.5), ("--temperature", -1), ("--device", "tpu")])
    def test_impossible_options(self, run, seen, tmp_path, option):
        assert run("generate", tmp_path, "--prompt", "Hi", *option).exit_code == 2
        assert seen == {}


class TestErrors:
    def test_a_users_error_is_printed_once_without_a_traceback(self, run):
        result = run("train", "hope/demo", "sed=3")
        assert result.exit_code == 2
        assert result.stderr.startswith("ConfigError: ")
        assert result.stderr.count("did you mean `seed`?") == 1
        assert "Traceback" not in result.output
        assert "\x1b" not in result.stderr  # plain text away from a terminal
        assert result.stdout == ""

    @pytest.mark.parametrize("error", [DataError, CheckpointError])
    def test_errors_of_the_stages(self, run, stub, error):
        long = "x" * 200  # longer than a terminal line: must not be broken

        def fail(config, *, resume):
            raise error(f"[red]{long}")

        stub("nested_lm.train.trainer", train=fail)
        result = run("train", "hope/demo")
        assert result.exit_code == 2
        assert result.stderr == f"{error.__name__}: [red]{long}\n"

    def test_a_defect_is_not_hidden(self, run, stub):
        def fail(config, *, resume):
            raise ZeroDivisionError

        stub("nested_lm.train.trainer", train=fail)
        assert isinstance(run("train", "hope/demo").exception, ZeroDivisionError)

    def test_ctrl_c(self, run, stub):
        def interrupt(config, *, resume):
            raise KeyboardInterrupt

        stub("nested_lm.train.trainer", train=interrupt)
        result = run("train", "hope/demo")
        assert result.exit_code == 130
        assert result.stderr == "interrupted\n"

    @pytest.mark.parametrize("code", [130, 143])
    def test_a_training_that_saved_and_stopped_says_so(self, run, stub, code):
        stub("nested_lm.train.trainer", train=lambda config, *, resume: finished(code))
        assert run("train", "hope/demo").exit_code == code

    def test_a_stop_ends_the_sweep(self, run, stub):
        seen = []
        stub(
            "nested_lm.train.trainer",
            train=lambda config, *, resume: seen.append(config.seed) or finished(143),
        )
        assert run("train", "hope/demo", "-m", "seed=1,2").exit_code == 143
        assert seen == [1]
