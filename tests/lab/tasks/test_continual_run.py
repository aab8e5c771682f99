"""`nested-lm eval continual` on tiny trained runs: every task, its files, and what it refuses."""

import json
import re
import shutil

import numpy as np
import pytest
import torch

from nested_lm.checkpoint import list_checkpoints, load_model, read_tensors
from nested_lm.errors import CheckpointError, ConfigError, DataError, NumericsError, ReportError
from nested_lm_lab.evaluation.options import read_settings
from nested_lm_lab.evaluation.progress import Progress
from nested_lm_lab.evaluation.results import load_result
from nested_lm_lab.evaluation.run import evaluate_run
from nested_lm_lab.evaluation.subject import Subject
from nested_lm_lab.tasks.continual import over_periods, over_steps
from nested_lm_lab.tasks.continual.comparison import compare_runs, load_comparison
from nested_lm_lab.tasks.continual.evaluate import evaluate_continual
from nested_lm_lab.tasks.continual.settings import ContinualSettings
from nested_lm_lab.tasks.continual.step_log import ProbeLog
from tests.lab.tasks.continual_runs import LEVELS, PERIODS, STEP_TOKENS, STEPS, config_of, trained

SETTINGS = ContinualSettings(
    bootstrap_samples=100,
    permutations=200,
    entities=2,
    attributes=1,
    epochs=2,
    lesson_sentences=3,
    test_sentences=2,
    batch_size=64,
    reading_documents=2,
    mentions=1,
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_data):
    """A Hope run with a probe, the same read mixed, and one with in-context levels. Read only."""
    root, data_config = tmp_path_factory.mktemp("runs"), tiny_data.config
    mixed = {"kind": "chronological", "periods": PERIODS, "order": "shuffled"}
    return {
        "hope": trained(data_config, root / "hope", probe={"sequences": 2}),
        "mixed": trained(data_config, root / "mixed", stream=mixed),
        "in_context": trained(data_config, root / "in-context", model="in_context"),
    }


def evaluate(*sources, tasks, settings=SETTINGS, oracle=None, output_dir=None, report=lambda line: None):
    return evaluate_continual(
        sources,
        settings.model_copy(update={"tasks": tasks, "oracle": oracle}),
        output_dir=output_dir,
        device=torch.device("cpu"),
        report=report,
    )


def measured(path, tmp_path, task, **options):
    """Metrics of one task, written elsewhere than into the run that tests share."""
    (found,) = evaluate(path, tasks=(task,), output_dir=tmp_path, **options)
    return load_result(found).metrics


class TestPeriods:
    def test_regret_is_the_distance_from_the_oracle(self, runs, tmp_path):
        metrics = measured(runs["hope"], tmp_path, "regret", oracle=runs["mixed"])
        matrix = load_result(evaluate(runs["hope"], tasks=("stream",))[0]).metrics.bits_per_byte
        regret = np.array([[cell.value for cell in row] for row in metrics.regret])
        losses = np.array([[cell.value for cell in row] for row in matrix])
        oracle = np.array([cell.value for cell in metrics.bits_per_byte])
        np.testing.assert_allclose(regret, losses[1:] - oracle, atol=1e-6)  # other batches round otherwise
        assert metrics.on.value == pytest.approx(np.diagonal(regret).mean())
        assert metrics.below.value == pytest.approx(regret[np.tril_indices(PERIODS, -1)].mean())
        assert metrics.oracle.name == "mixed"

    def test_an_oracle_with_other_chunks_reads_documents_its_own_way(self, runs, tmp_path, tiny_data):
        plain = trained(tiny_data.config, tmp_path / "plain", model="transformer")
        metrics = measured(plain, tmp_path, "regret", oracle=runs["mixed"])
        of_hope = measured(runs["hope"], tmp_path / "hope", "regret", oracle=runs["mixed"])
        assert metrics.bits_per_byte == of_hope.bits_per_byte

    def test_an_oracle_with_another_budget_is_refused(self, runs, tmp_path, tiny_data):
        short = trained(tiny_data.config, tmp_path / "short", budget_tokens=3 * STEP_TOKENS)
        with pytest.raises(CheckpointError, match="training tokens is 96, the run's is 1536"):
            evaluate(runs["hope"], tasks=("regret",), oracle=short)
        with pytest.raises(ConfigError, match="--oracle"):
            evaluate(runs["hope"], tasks=("regret",))

    def test_carried_state_reads_documents_whole(self, runs, tmp_path):
        metrics = measured(runs["hope"], tmp_path, "carried")
        assert [len(metrics.bits_per_byte), len(metrics.bits_per_byte[0])] == [PERIODS + 1, PERIODS]
        final = [cell.value for cell in metrics.bits_per_byte[-1]]
        assert metrics.accuracy.value == pytest.approx(np.mean(final))

    def test_a_lesion_sets_one_level_back_and_nothing_else(self, runs):
        paths = list_checkpoints(runs["hope"] / "checkpoints")
        model, earlier = (load_model(path, device="cpu").model for path in (paths[-1], paths[0]))
        whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        before = over_periods.set_back(model, earlier, 1)
        changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, whole[name])}
        assert changed
        assert all(".channel.levels.1." in name for name in changed)
        start = read_tensors(paths[0], "model")
        assert all(torch.equal(model.state_dict()[name], start[name]) for name in before)
        model.load_state_dict(before, strict=False)
        assert all(torch.equal(tensor, whole[name]) for name, tensor in model.state_dict().items())

    def test_lesion_matrix(self, runs, tmp_path):
        metrics = measured(runs["hope"], tmp_path, "lesion")
        assert [level.period_tokens for level in metrics.levels] == list(LEVELS)
        assert all(len(level.damage) == PERIODS for level in metrics.levels)
        # Taking everything but the levels back to its start costs more than any level.
        others = np.mean([cell.value for cell in metrics.others])
        assert others > max(np.mean([cell.value for cell in level.damage]) for level in metrics.levels)
        assert metrics.correlation is None or metrics.correlation.smallest_p == pytest.approx(2 / 6)

    def test_a_border_that_is_no_earlier_one_is_refused(self, runs):
        settings = SETTINGS.model_copy(update={"set_back_to": "period-3"})
        with pytest.raises(ConfigError, match="period-0 to period-2"):
            evaluate(runs["hope"], tasks=("lesion",), settings=settings)


class TestSteps:
    def log(self, steps, losses):
        steps = np.array(steps)
        return ProbeLog(steps, steps * 10, np.array(losses, dtype=float), steps_per_period=2, step_tokens=10)

    def test_changes_are_those_of_the_periods_that_are_over(self):
        losses = [[9, 9, 9], [8, 9, 9], [7, 5, 9], [7, 4, 9], [6, 5, 1], [8, 5, 0]]
        tokens, changes, blocks = over_steps.old_changes(self.log([1, 2, 3, 4, 5, 6], losses))
        assert tokens.tolist() == [30, 40, 50, 60]
        assert changes.tolist() == [-1.0, 0.0, (-1.0 + 1.0) / 2, (2.0 + 0.0) / 2]
        assert blocks.tolist() == [1, 1, 2, 2]

    def test_a_step_that_was_skipped_begins_a_new_block(self):
        tokens, _, blocks = over_steps.old_changes(self.log([1, 2, 3, 5, 6], np.ones((5, 3))))
        assert tokens.tolist() == [30, 60]
        assert len(set(blocks.tolist())) == 2

    def test_forgetting_curves_start_where_a_period_ends_and_never_fall_below_its_best(self):
        losses = [[9, 9, 9], [5, 9, 9], [4, 9, 9], [6, 3, 9], [6, 4, 9], [3, 5, 0]]
        first, second = over_steps.forgetting_curves(self.log([1, 2, 3, 4, 5, 6], losses))
        assert first.age.tolist() == [10.0, 20.0, 30.0, 40.0]
        assert first.lost.tolist() == [0.0, 2.0, 2.0, 0.0]
        assert second.age.tolist() == [10.0, 20.0]
        assert second.lost.tolist() == [1.0, 2.0]

    def test_changes_around_places(self):
        places, changes = over_steps.changes_around(np.array([1.0, 3.0, 5.0, 5.0, 0.0, 2.0, 99.0]), 2)
        assert places.tolist() == [2, 4]
        assert changes.tolist() == [3.0, -4.0]

    def test_events_of_training(self, runs, tmp_path):
        metrics = measured(runs["hope"], tmp_path, "events")
        assert metrics.reading is None
        fastest, middle, slowest = metrics.training
        assert (fastest.effect, fastest.why) == (
            None,
            "it ticks at every place, so that there is nothing to compare with",
        )
        assert (middle.matched_tokens, slowest.matched_tokens) == (LEVELS[0], LEVELS[1])
        assert middle.effect.ticks + middle.effect.others == 2 * (STEPS - 2)
        assert middle.effect.shifts == 2**2
        assert 0 < middle.effect.smallest_p <= middle.effect.p_value <= 1

    def test_events_while_reading(self, runs, tmp_path, monkeypatch):
        monkeypatch.setattr(over_steps, "READING_TOKENS", 96)
        metrics = measured(runs["in_context"], tmp_path, "events")
        assert metrics.training is None
        assert [level.period_tokens for level in metrics.reading] == [4, 8]
        assert [level.matched_tokens for level in metrics.reading] == [1, 4]
        assert metrics.reading[0].effect is not None

    def test_retention(self, runs, tmp_path):
        metrics = measured(runs["hope"], tmp_path, "retention")
        assert metrics.periods == LEVELS
        assert len(metrics.curves) == len(metrics.tied.held_out) == PERIODS - 1
        assert max(metrics.curves[0].age_tokens) == 2 * STEPS * STEP_TOKENS
        assert metrics.tied_is_better == (metrics.tied.held_out_error < metrics.free.held_out_error)

    def test_a_run_without_probe_is_refused(self, runs):
        with pytest.raises(ConfigError, match=r"train\.probe"):
            evaluate(runs["mixed"], tasks=("events",))
        with pytest.raises(ConfigError, match=r"train\.probe"):
            evaluate(runs["mixed"], tasks=("retention",))

    @pytest.mark.parametrize(
        ("edit", "error", "message"),
        [
            (lambda line: line.replace('"probe/1"', '"probe/x"'), ReportError, r"metrics\.jsonl:\d+ is no step record"),
            (lambda line: line.replace('"probe/0": ', '"probe/0": NaN, "x": '), NumericsError, "is not finite"),
            (lambda line: "", ReportError, "ends at step 47 of 48"),
        ],
    )
    def test_a_damaged_log_is_refused(self, runs, tmp_path, edit, error, message):
        copy = tmp_path / "copy"
        shutil.copytree(runs["hope"], copy)
        lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
        last = max(index for index, line in enumerate(lines) if '"event": "step"' in line)
        lines[last] = edit(lines[last])
        (copy / "metrics.jsonl").write_text("".join(lines))
        with pytest.raises(error, match=message):
            evaluate(copy, tasks=("retention",), output_dir=tmp_path / "out")
        assert not (tmp_path / "out").exists()


class TestWhatRuns:
    def test_by_default_all_that_can(self, runs, monkeypatch):
        pytest.importorskip("sacrebleu")
        names, lines = [], []
        monkeypatch.setattr(
            "nested_lm_lab.tasks.continual.evaluate.publish", lambda task, subject: names.append(task.name)
        )
        evaluate(runs["hope"], tasks=None, report=lines.append)
        on_the_run = ["continual", "carried", "lesion", "events", "retention"]
        assert names == [*on_the_run, "changing_facts", "invented_languages"]
        assert lines[:2] == ["regret: left out, no --oracle", "classes: left out, no --class-data"]

    def test_a_result_of_the_same_checkpoint_and_settings_is_kept(self, runs, tmp_path):
        lines = []
        for seed in (0, 0, 1):
            settings = SETTINGS.model_copy(update={"seed": seed})
            evaluate(runs["hope"], tasks=("facts",), settings=settings, output_dir=tmp_path, report=lines.append)
        said = [line for line in lines if line.startswith("changing_facts")]
        assert ["kept" in line for line in said] == [False, True, False]

    @pytest.mark.parametrize(
        ("task", "name"),
        [("facts", "changing_facts"), ("carried", "carried"), ("stream", "continual"), ("lesion", "lesion")],
    )
    def test_long_tasks_say_how_far_they_are_and_how_fast_they_were(self, runs, tmp_path, monkeypatch, task, name):
        monkeypatch.setattr("nested_lm_lab.evaluation.progress._EVERY_S", 0.0)
        lines = []
        evaluate(runs["hope"], tasks=(task,), output_dir=tmp_path, report=lines.append)
        assert re.fullmatch(name + r": \d+% of [\d,]+ tokens, [\d,]+ tokens/s, .* left", lines[0])
        said = [line for line in lines if not line.startswith("  ")]
        assert said[-2].startswith(f"{name}: 100% of ")
        assert len(said) < len(lines)  # the scores
        assert re.match(name + r": [\d.]+ s, [\d,]+ tokens, [\d,]+ tokens/s, ", lines[-1])

    def test_the_matrix_obeys_the_options(self, runs, tmp_path):
        fewer = ContinualSettings(pieces_per_document=1, bootstrap_samples=100, batch_size=3)
        own, other = (
            load_result(evaluate(runs["hope"], tasks=("stream",), output_dir=tmp_path / str(place), settings=given)[0])
            for place, given in enumerate((SETTINGS, fewer))
        )
        assert own.settings["pieces_per_document"] == 6
        assert other.settings["pieces_per_document"] == 1
        assert other.metrics.segments[0].tokens < own.metrics.segments[0].tokens

    def test_the_matrix_is_the_result_of_the_plain_evaluation(self, runs, tmp_path):
        copy = tmp_path / "copy"
        shutil.copytree(runs["hope"], copy)
        shutil.rmtree(copy / "results", ignore_errors=True)
        (path,) = evaluate_run(copy, ("continual",), report=lambda line: None)
        plain, lines = load_result(path), []
        evaluate(copy, tasks=("stream",), report=lines.append)
        assert "continual: kept" in lines[0]
        path.unlink()
        evaluate(copy, tasks=("stream",))
        again = load_result(path)
        assert (again.settings, again.checkpoint, again.identity) == (plain.settings, plain.checkpoint, plain.identity)
        assert again.metrics.accuracy.value == pytest.approx(plain.metrics.accuracy.value, abs=1e-6)

    def test_pieces_are_those_of_the_run_unless_given(self, tmp_path, tiny_data):
        config = config_of(tiny_data.config, tmp_path)
        own = config.eval.model_copy(
            update={"continual": config.eval.continual.model_copy(update={"pieces_per_document": 4})}
        )
        assert ContinualSettings(seed=1).of_run(own) == ContinualSettings(seed=1, pieces_per_document=4)
        assert ContinualSettings(pieces_per_document=None).of_run(own).pieces_per_document is None

    def test_a_checkpoint_has_results_of_its_own(self, runs):
        border = list_checkpoints(runs["hope"] / "checkpoints")[1]
        (path,) = evaluate(border, tasks=("facts",))
        assert path == runs["hope"] / "results" / border.name / "changing_facts.json"
        assert load_result(path).checkpoint.name == border.name

    def test_an_edited_result_is_measured_again(self, runs, tmp_path):
        (path,) = evaluate(runs["hope"], tasks=("events",), output_dir=tmp_path)
        document = json.loads(path.read_text())
        document["metrics"]["training"][1]["effect"]["p_value"] = 0.001
        path.write_text(json.dumps(document))
        with pytest.raises(ReportError, match="was changed after it was written"):
            load_result(path)
        lines = []
        evaluate(runs["hope"], tasks=("events",), output_dir=tmp_path, report=lines.append)
        assert "measured again" in lines[0]
        load_result(path)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"tasks": "telepathy"}, "unknown task 'telepathy'; choices: stream, regret"),
            ({"tasks": "classes"}, "--class-data"),
        ],
    )
    def test_what_cannot_run_is_refused(self, runs, given, message):
        with pytest.raises(ConfigError, match=message):
            evaluate_continual([runs["hope"]], read_settings(ContinualSettings, given))

    def test_tasks_that_do_not_fit_the_run_are_refused(self, tmp_path, tiny_data):
        shuffled = trained(tiny_data.config, tmp_path / "a", stream={"kind": "shuffled"}, budget_tokens=64)
        with pytest.raises(ConfigError, match=r"stream is shuffled; this task compares the periods"):
            evaluate(shuffled, tasks=("lesion",))
        attention = trained(tiny_data.config, tmp_path / "b", model="transformer")
        with pytest.raises(ConfigError, match="has no levels to set back"):
            evaluate(attention, tasks=("lesion",))
        with pytest.raises(ConfigError, match="grows with the text"):
            evaluate(attention, tasks=("carried",))

    def test_weights_that_are_not_finite_write_nothing(self, runs, tmp_path, monkeypatch):
        opened = Subject.open

        def broken(*args, **kwargs):
            subject = opened(*args, **kwargs)
            with torch.no_grad():
                subject.loaded.model.embedding.weight.fill_(float("nan"))
            return subject

        monkeypatch.setattr(Subject, "open", broken)
        with pytest.raises(NumericsError, match="not finite"):
            evaluate(runs["hope"], tasks=("facts",), output_dir=tmp_path / "out")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("changed", "error", "message"),
        [
            ({"data_hash": "0" * 16}, DataError, "test documents may have been trained on"),
            ({"tokenizer_hash": "0" * 64}, CheckpointError, "was trained with tokenizer 0000"),
        ],
    )
    def test_data_that_was_built_again_is_refused(self, runs, tmp_path, changed, error, message):
        out = tmp_path / "out"
        subject = Subject.open(runs["hope"], device=torch.device("cpu"), results=out, report=lambda line: None)
        subject.loaded.identity.update(changed)
        with pytest.raises(error, match=message):
            over_periods.measure_lesions(subject, SETTINGS, Progress(0, print))


class TestComparison:
    def test_runs_side_by_side(self, runs, tmp_path, tiny_data):
        again = trained(tiny_data.config, tmp_path / "again", seed=4)
        evaluate(runs["hope"], again, tasks=("stream",))
        evaluate(runs["hope"], tasks=("retention",))
        found = compare_runs(
            [runs["hope"], again], tmp_path / "sweep.json", settings=SETTINGS, report=lambda line: None
        )
        assert load_comparison(tmp_path / "sweep.json") == found
        first, second = found.rows
        assert (first.identity.seed, second.identity.seed) == (3, 4)
        assert first.periods == LEVELS
        assert first.retention_scale is not None
        assert second.retention_scale is None
        matrix = load_result(again / "results" / "continual.json").metrics
        assert second.forgetting == pytest.approx(np.mean([cell.value for cell in matrix.forgetting[-1][:-1]]))
        assert all(trend.correlation is None for trend in found.trends)  # two runs are no trend

    def test_an_edited_comparison_is_refused(self, runs, tmp_path):
        path = tmp_path / "sweep.json"
        evaluate(runs["hope"], tasks=("stream",))
        compare_runs([runs["hope"], runs["hope"]], path, settings=SETTINGS, report=lambda line: None)
        path.write_text(path.read_text().replace('"forgetting": 0', '"forgetting": 1', 1))
        with pytest.raises(ReportError, match="changed after it was written"):
            load_comparison(path)

    def test_rows_of_unlike_conditions_are_refused(self, runs, tmp_path):
        evaluate(runs["hope"], runs["mixed"], tasks=("stream",))
        with pytest.raises(ReportError, match="may not share a table"):
            compare_runs(
                [runs["hope"], runs["mixed"]], tmp_path / "x.json", settings=SETTINGS, report=lambda line: None
            )
        assert not (tmp_path / "x.json").exists()
        with pytest.raises(ConfigError, match="two or more"):
            compare_runs([runs["hope"]], tmp_path / "x.json", settings=SETTINGS, report=lambda line: None)
