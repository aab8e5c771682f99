"""Needle curves end to end: oracles score what they must, results are whole, memory may end."""

import json
from pathlib import Path

import pytest
import torch

from nested_lm.checkpoint import MANIFEST, LoadedCheckpoint
from nested_lm.config.load import load_run
from nested_lm.data.tokenizer import TextTokenizer
from nested_lm.errors import ConfigError, DataError, NumericsError, ReportError
from nested_lm_lab.evaluation.bootstrap import wilson
from nested_lm_lab.evaluation.options import read_settings
from nested_lm_lab.evaluation.progress import LengthProgress, Progress
from nested_lm_lab.evaluation.publish import publish
from nested_lm_lab.evaluation.results import load_result
from nested_lm_lab.evaluation.subject import Subject
from nested_lm_lab.tasks.needles.answers import string_match
from nested_lm_lab.tasks.needles.lists import make_list_sample
from nested_lm_lab.tasks.needles.metrics import NeedleLength
from nested_lm_lab.tasks.needles.niah import NiahTask
from nested_lm_lab.tasks.needles.settings import GROUPS, NiahSettings
from nested_lm_lab.tasks.needles.stops import explain_stop
from nested_lm_lab.tasks.needles.summary import effective_lengths, effective_words
from tests.lab.tasks.niah_oracles import Blind, Oracle

DEFAULTS = {
    "seed": 0,
    "haystack": None,
    "max_new_tokens": 12,
    "batch_rows": 8,
    "max_state_mib": 64,
}


def settings(*, tasks="s1", lengths="500,700", depths="0,0.5,1", samples=3, **others):
    given = {"tasks": tasks, "lengths": lengths, "depths": depths, "samples": samples, **DEFAULTS, **others}
    return read_settings(NiahSettings, given).model_copy(update={"bootstrap_samples": 200})


@pytest.fixture(scope="module")
def tokenizer(data_config):
    return TextTokenizer.load(Path(data_config.output_dir) / "tokenizer.json")


@pytest.fixture
def measure(tokenizer, tmp_path):
    """Measure a model and return what was written and what was said."""
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000004"
    checkpoint.mkdir(parents=True)
    (checkpoint / MANIFEST).write_text("{}")
    output = tmp_path / "run" / "results" / "niah.json"

    def run(model, *, run_id="r1", label=None, output=output, **changed):
        identity = {
            "run_id": run_id,
            "name": "oracle",
            "config_hash": "c" * 16,
            "data_hash": None,
            "tokenizer_hash": tokenizer.hash,
            "commit": "abc",
            "seed": 1,
            "parameters": 1,
        }
        loaded = LoadedCheckpoint(model, load_run("hope/demo"), tokenizer, identity, 4, 4096, None)
        lines = []
        subject = Subject(checkpoint, checkpoint.parent.parent, None, loaded, loaded.config.eval, lines.append)
        path = publish(NiahTask(settings(**changed)), subject, label=label, output=output)
        return load_result(path), lines

    return run


def test_an_oracle_finds_every_needle_and_its_controls_say_why(measure, tokenizer):
    result, lines = measure(Oracle(tokenizer), tasks="s1,mk2")
    for task in result.metrics.tasks:
        assert [entry.length for entry in task.lengths] == [500, 700]
        assert [found.length for found in task.effective] == [None, None]  # three of three is no proof
        for entry in task.lengths:
            scores, controls = entry.scores, entry.scores.controls
            assert scores.score.match.value == scores.score.exact.value == 1.0
            assert scores.score.match.n == 3  # samples, not rows
            assert scores.score.match.low == pytest.approx(0.4385, abs=1e-4)  # Wilson, 3 of 3
            assert scores.score.median_rank == 1
            assert scores.score.nats.value < 1e-3
            assert controls.no_needle.match.value == controls.no_needle.exact.value == 0.0
            assert controls.needle_only.exact.value == 1.0
            assert controls.reset.exact.value == 0.0
            assert controls.frozen.exact.value == 1.0  # what was read before the question is still there
            assert controls.unwritten.exact.value == 0.0  # it was never written
            assert len(scores.control_rows.unwritten_nats) == 3
            assert scores.worth.value > 3
            assert [cell.depth for cell in scores.cells] == [0.0, 0.5, 1.0]
            assert all(cell.score.exact.value == 1.0 for cell in scores.cells)
            distances = [cell.distance for cell in scores.cells]
            assert distances == sorted(distances, reverse=True)
            assert len(scores.rows.sample) == 9
            # Three depths, the middle one unwritten, and no needle, which makes a shorter prompt.
            assert 14 * entry.length < scores.tokens < 15 * entry.length
            assert scores.tokens_read < scores.tokens
    assert result.settings["haystacks"] == {"s1": "noise", "mk2": "needle"}
    assert result.identity.data_hash == "none"
    assert any("match 1.000" in line for line in lines)


def test_a_blind_model_scores_at_chance(measure, tokenizer):
    result, _ = measure(Blind(tokenizer), tasks="s1,mv", lengths="700")
    for task in result.metrics.tasks:
        (entry,) = task.lengths
        assert entry.scores.score.match.value == entry.scores.score.exact.value == 0.0
        assert entry.scores.score.median_rank == tokenizer.vocab_size  # ties count against it
        assert entry.scores.score.nats.value == pytest.approx(
            torch.log(torch.tensor(float(tokenizer.vocab_size))).item(), rel=1e-5
        )
        assert entry.scores.worth.value == pytest.approx(0.0, abs=1e-9)
        assert entry.scores.controls.frozen is None  # it has nothing to freeze
        assert entry.scores.controls.unwritten is None


def test_all_tasks_can_be_measured(measure, tokenizer):
    result, _ = measure(Blind(tokenizer), tasks="all", lengths="1600", samples=1, depths="0.5", max_new_tokens=1)
    assert [task.task for task in result.metrics.tasks] == list(GROUPS["all"])
    for task in result.metrics.tasks:
        assert bool(task.lengths[0].scores.cells) == (task.task in ("s1", "s2", "s3", "mk1", "mk2", "mk3"))
        assert (task.lengths[0].scores.controls.needle_only is None) == (task.task in ("cwe", "fwe"))


def test_a_growing_state_runs_until_memory_ends_and_says_so(measure, tokenizer):
    model = Oracle(tokenizer, grows=True)  # 1 KiB a token, twice while it is copied
    result, _ = measure(model, lengths="500,2000,4000", max_state_mib=2, depths="0,1", samples=2)
    short, long, longer = result.metrics.tasks[0].lengths
    assert short.scores.score.match.value == 1.0
    assert max(model.rows[1:]) == 2  # fewer side by side, once the first segment has shown what a row takes
    assert long.scores is None
    assert long.stopped == "a state of 1,869 tokens: 4 MiB while it is copied, and the limit is 2 MiB (--max-state-mib)"
    assert longer.stopped == "not tried: the limit of 2 MiB (--max-state-mib) was reached at 2,000 tokens"
    assert not result.metrics.constant_state


def test_controls_are_read_fewer_side_by_side_where_prompts_were(measure, tokenizer):
    model = Oracle(tokenizer, grows=True)
    result, _ = measure(model, lengths="500", max_state_mib=2, depths="0.5", samples=8, batch_rows=16)
    (entry,) = result.metrics.tasks[0].lengths
    assert entry.stopped is None
    assert len(entry.scores.control_rows.unwritten_nats) == 8
    assert entry.scores.controls.unwritten.exact.value == 0.0


def test_a_result_that_stopped_is_measured_again_under_a_higher_limit_only(measure, tokenizer):
    options = {"lengths": "500,2000", "depths": "0.5", "samples": 1}
    stopped, _ = measure(Oracle(tokenizer, grows=True), max_state_mib=2, **options)
    assert stopped.metrics.tasks[0].lengths[1].scores is None
    for limit in (1, 2):
        again, lines = measure(Oracle(tokenizer, grows=True), max_state_mib=limit, **options)
        assert again == stopped
        assert "kept" in lines[0]
    whole, lines = measure(Oracle(tokenizer, grows=True), max_state_mib=8, **options)
    assert "ended early, and will be replaced" in lines[0]
    assert whole.metrics.tasks[0].lengths[1].scores is not None
    again, lines = measure(Oracle(tokenizer, grows=True), max_state_mib=64, **options)
    assert again == whole
    assert "kept" in lines[0]


def test_a_sample_that_cannot_be_made_is_refused_before_anything_is_read(measure, tokenizer, monkeypatch):
    def make(task, tokenizer, *, length, number, **others):
        if (length, number) == (700, 2):
            raise DataError("no room")
        return make_list_sample(task, tokenizer, length=length, number=number, **others)

    monkeypatch.setattr("nested_lm_lab.tasks.needles.suites.make_list_sample", make)
    model = Blind(tokenizer)
    with pytest.raises(DataError, match="no room"):
        measure(model, tasks="fwe", lengths="700,900", batch_rows=2)
    assert not model.rows


@pytest.mark.parametrize("kind", ["self_modifying", "attention"])
def test_batches_and_sharing_change_no_score_of_a_model(kind, measure, make_model, tmp_path):
    found = []
    for rows in (1, 2, 32):
        result, _ = measure(make_model(kind), lengths="500", depths="0,1", batch_rows=rows, samples=1, max_new_tokens=2)
        scores = result.metrics.tasks[0].lengths[0].scores
        (tmp_path / "run" / "results" / "niah.json").unlink()
        columns = scores.control_rows
        unwritten = columns.unwritten_nats or ()
        assert bool(unwritten) == (kind == "self_modifying")
        found.append(scores.rows.nats + columns.no_needle_nats + columns.reset_nats + unwritten)
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert found[0] == pytest.approx(found[2], rel=1e-4)


def test_a_result_is_kept_until_settings_change_and_never_edited(measure, tokenizer, tmp_path):
    path = tmp_path / "run" / "results" / "niah.json"
    first, _ = measure(Blind(tokenizer), lengths="500")
    again, lines = measure(Oracle(tokenizer), lengths="500", batch_rows=2)
    assert again == first
    assert "kept" in lines[0]
    assert lines[1] == "  s1: match 0.00 [0.00, 0.56] at 500"
    changed, lines = measure(Oracle(tokenizer), lengths="500", samples=2)
    assert changed.metrics.tasks[0].lengths[0].scores.score.match.value == 1.0
    assert "another settings" in lines[0]
    document = json.loads(path.read_text())
    document["metrics"]["tasks"][0]["lengths"][0]["scores"]["score"]["match"]["value"] = 0.9
    path.write_text(json.dumps(document))
    with pytest.raises(ReportError, match="changed after it was written"):
        load_result(path)


def test_what_cannot_be_made_is_refused_before_anything_is_read_or_written(measure, tokenizer, tmp_path):
    model = Oracle(tokenizer)
    book = tmp_path / "short.txt"
    book.write_text("A book of one sentence. And another.")
    with pytest.raises(DataError, match="no room for task s1"):
        measure(model, lengths="64,500")
    with pytest.raises(DataError, match="haystack is too short"):
        measure(model, tasks="s2", books=(book,))
    with pytest.raises(DataError, match="is not a text file"):
        measure(model, tasks="s2", books=(Path("missing.txt"),))
    with pytest.raises(ConfigError, match="task cwe cannot have it"):
        measure(model, tasks="cwe", haystack="books")
    with pytest.raises(ConfigError, match="no task reads them"):
        measure(model, tasks="s1", books=(book,))
    assert not model.rows
    assert not (tmp_path / "run" / "results").exists()


def test_the_result_of_another_run_is_not_replaced(measure, tokenizer, tmp_path):
    path = tmp_path / "run" / "results" / "niah.json"
    measure(Blind(tokenizer), lengths="500")
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"niah\.json holds the scores of run r1, this is r2; .*--output"):
        measure(Blind(tokenizer), run_id="r2", lengths="500")
    assert path.read_bytes() == before
    _, lines = measure(Blind(tokenizer), lengths="500", samples=2)  # the same run, other settings
    assert any("will be replaced" in line for line in lines)
    assert path.read_bytes() != before


def test_a_label_sets_a_result_apart(measure, tokenizer):
    result, _ = measure(Blind(tokenizer), lengths="500", samples=1, label="long")
    assert result.task == "niah_long"
    with pytest.raises(ConfigError, match=r"--label '\.\./x'"):
        measure(Blind(tokenizer), label="../x")


def test_a_diverged_model_is_named_and_nothing_is_written(measure, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("nested_lm.reading.calls.locate_nonfinite", lambda *_, **__: None)  # looks into real models
    model = Oracle(tokenizer)
    model.answer = lambda memory, recent: torch.full((tokenizer.vocab_size,), float("nan"))
    with pytest.raises(NumericsError, match=r"niah on .*step-00000004: predictions are not finite"):
        measure(model)
    assert not (tmp_path / "run" / "results").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tasks": "s9"}, "unknown task 's9'; choices: all, niah, s1"),
        ({"tasks": " , "}, "--tasks"),
        ({"lengths": "2m"}, "'2m' is not a number of tokens"),
        ({"depths": "0,2"}, "--depths"),
        ({"depths": "deep"}, "neither how many depths"),
        ({"depths": "0"}, r"--depths: 0: a whole number is how many depths; write 0\.0"),
        ({"depths": "-3"}, "--depths: -3: a whole number is how many"),
        ({"samples": 0}, "--samples"),
    ],
)
def test_settings_that_cannot_be_are_refused(changed, message):
    with pytest.raises(ConfigError, match=message):
        settings(**changed)


def test_sizes_groups_and_depths_may_be_written_short():
    found = settings(tasks="niah,s1", lengths="32k,2k,2048", depths="11")
    assert found.tasks == GROUPS["niah"]
    assert found.lengths == (2048, 32768)
    assert found.depths == tuple(index / 10 for index in range(11))
    assert settings(depths="0.5").depths == (0.5,)


@pytest.mark.parametrize(
    ("written", "meant"),
    [("1", (0.5,)), ("2", (0.0, 1.0)), ("1.0", (1.0,)), ("0.0", (0.0,)), ("1,", (1.0,)), ("0,1", (0.0, 1.0))],
)
def test_a_whole_number_counts_depths_and_a_point_or_comma_names_them(written, meant):
    assert settings(depths=written).depths == meant


def test_effective_length_ends_at_the_first_length_below(measure, tokenizer):
    result, _ = measure(Oracle(tokenizer), lengths="500")
    scores = result.metrics.tasks[0].lengths[0].scores

    def entry(length, low):
        match = scores.score.match.model_copy(update={"low": low})
        changed = scores.model_copy(update={"score": scores.score.model_copy(update={"match": match})})
        return NeedleLength(length=length, scores=changed, stopped=None)

    curve = [entry(2048, 0.9), entry(4096, 0.7), entry(8192, 0.4), entry(16384, 0.95)]
    assert [(found.threshold, found.length) for found in effective_lengths(curve)] == [(0.5, 4096), (0.856, 2048)]
    stopped = NeedleLength(length=4096, scores=None, stopped="memory ended")
    assert [found.length for found in effective_lengths([entry(2048, 0.9), stopped, entry(8192, 0.9)])] == [2048, 2048]


def perfect(scores, samples):
    """One length at which every one of so many samples is found."""
    share = wilson(samples, samples)
    score = scores.score.model_copy(update={"match": share, "exact": share})
    return NeedleLength(length=2048, scores=scores.model_copy(update={"score": score}), stopped=None)


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        (3, ["not decidable with 3 samples"] * 2),
        (20, ["2,048", "not decidable with 20 samples"]),
        (24, ["2,048", "2,048"]),  # the default
    ],
)
def test_a_length_that_no_score_of_so_few_samples_can_show_is_not_called_none(measure, tokenizer, samples, words):
    result, lines = measure(Oracle(tokenizer), lengths="500")
    assert (
        "s1: effective length "
        + ", ".join(f"not decidable with 3 samples (match at least {threshold})" for threshold in ("0.5", "0.856"))
        in lines
    )
    task = result.metrics.tasks[0]
    lengths = (perfect(task.lengths[0].scores, samples),)
    task = task.model_copy(update={"lengths": lengths, "effective": effective_lengths(lengths)})
    assert [effective_words(task, found) for found in task.effective] == words


def test_no_effective_length_is_none_where_enough_samples_decide_it_and_not_measured_without_any(measure, tokenizer):
    result, _ = measure(Blind(tokenizer), lengths="500", samples=24, depths="1")
    task = result.metrics.tasks[0]
    assert [effective_words(task, found) for found in task.effective] == ["none", "none"]
    stopped = NeedleLength(length=2048, scores=None, stopped="memory ended")
    task = task.model_copy(update={"lengths": (stopped,)})
    assert effective_words(task, task.effective[0]) == "not measured"


def test_a_setting_and_the_end_of_memory_are_told_apart_in_old_results_too():
    def stops(first, later):
        lengths = [
            NeedleLength(length=2048, scores=None, stopped=first),
            NeedleLength(length=4096, scores=None, stopped=later),
        ]
        return [explain_stop(entry, lengths, 96) for entry in lengths]

    old = "not tried: memory ended at 2,048 tokens"
    assert stops("a state of 2,000 tokens: 99 MiB while it is copied, and the limit is 96 MiB", old) == [
        "the limit of 96 MiB (--max-state-mib) was reached at 2,048 tokens",
        "not tried: the limit of 96 MiB (--max-state-mib) was reached at 2,048 tokens",
    ]
    assert stops("memory ended (CUDA out of memory)", old) == ["memory ended at 2,048 tokens", old]


def test_lengths_that_will_not_be_read_are_no_time_left():
    now = [0.0]
    lines = []
    planned = {(task, length): length for task in ("s1", "s2") for length in (1000, 4000, 5000)}
    told = Progress(0, lines.append, clock=lambda: now[0])
    progress = LengthProgress(planned, told)
    with progress.at("s1", 1000):
        told.add(1000)
    with progress.at("s1", 4000):
        told.add(500)  # then the state is too large
    progress.stop(4000)
    assert told.total == 2500  # what was read, and the one length of s2 that fits
    with progress.at("s1", 5000):
        pass
    now[0] = 150.0
    with progress.at("s2", 1000):
        told.add(1000)
    assert lines == ["s2 at 1,000 tokens: 100% of 2,500 tokens, 17 tokens/s, 0 s left"]
    with progress.at("s2", 4000):  # it fits after all
        told.add(4000)
    assert told.total == told.done == 6500


def test_string_match_is_a_share_whatever_the_case():
    assert string_match("The numbers are 12 and ABC.", ["12", "abc", "13", "14"]) == 0.5


def test_progress_reports_share_speed_and_time_left():
    now = [0.0]
    lines = []
    progress = Progress(1000, lines.append, clock=lambda: now[0])
    progress.label = "s1"
    progress.add(100)
    assert not lines
    now[0] = 60.0
    progress.add(150)
    assert lines == ["s1: 25% of 1,000 tokens, 4 tokens/s, 3 min left"]
