"""The speed suite runs, judges what it measured and nothing else, and times nothing that is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.speed import gate, peak, peers, report
from benchmarks.speed.cases import QUICK, Case, Goal, MemoryGoal, Side, Sizes, cases, memory_cases, timed_mixers
from benchmarks.speed.driver import JobError, Worker, Workers, prepare, take_turns

from nested_lm.config.mixers import SelfModifying
from nested_lm.ops.memory.cpu import backend as memory_cpu
from nested_lm.ops.memory.cpu import library as cpu_library

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speed")
    out, page = folder / "speed.json", folder / "page.md"
    page.write_text("before\n<!-- results: begin -->\nold\n<!-- results: end -->\nafter\n")
    command = [sys.executable, "-m", "benchmarks.speed", "--quick", "--out", str(out), "--page", str(page)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return json.loads(out.read_text()), page.read_text()


@pytest.mark.slow
class TestAQuickRun:
    def test_says_where_it_was_made(self, quick):
        result, _ = quick
        assert result["version"] == report.VERSION
        assert result["quick"]
        assert result["hardware"].keys() >= {"processor", "cores", "torch", "python", "threads"}
        assert len(result["gate"]["errors"]) == len(USABLE)
        assert max(result["gate"]["errors"].values()) <= result["gate"]["limit"]
        assert result["memories"] == cpu_library.describe()
        assert {"before", "after"} == result["load_average"].keys()
        assert "commit" in result

    def test_times_every_side_of_ours_and_says_why_the_peers_are_not(self, quick):
        result, _ = quick
        assert [case["name"] for case in result["cases"]] == [case.name for case in cases(QUICK)]
        for row in (row for case in result["cases"] for row in case["rows"]):
            if row["side"] == "cpu" and memory_cpu not in USABLE:
                assert "no C compiler" in row["missing"]
            elif "missing" in row:
                assert row["package"] != "nested_lm" or "nested-learning" in row["missing"] or "peers" in row["missing"]
            else:
                assert row["package"] == "nested_lm"
                assert len(row["cpu_s"]) == len(row["wall_s"]) == 1
                assert row["tokens_per_cpu_s"]["median"] == pytest.approx(row["tokens"] / row["cpu_s"][0])

    def test_goals_without_a_side_are_not_measured(self, quick):
        result, _ = quick
        goals = {goal["name"]: goal for case in result["cases"] for goal in case["goals"]}
        assert goals["C1"]["measured"] is goals["C1"]["met"] is None
        assert goals["C7"]["measured"] > 0
        assert goals["C7"]["met"] == (goals["C7"]["measured"] >= goals["C7"]["first"])

    def test_measures_memory_in_a_process_of_its_own(self, quick):
        result, _ = quick
        for row in result["memory"]["rows"]:
            assert row["peak_bytes"] > 50e6
            assert 0 < row["added_bytes"] < row["peak_bytes"]

    def test_writes_the_tables_between_the_markers(self, quick):
        _, page = quick
        assert page.startswith("before\n<!-- results: begin -->\n")
        assert page.endswith("<!-- results: end -->\nafter\n")
        assert "old" not in page
        assert "not timed: not asked for; run with --peers" in page


@pytest.mark.parametrize("size", [QUICK, Sizes()], ids=["quick", "full"])
class TestTheCases:
    def test_goals_name_sides(self, size):
        for case in cases(size):
            names = [side.name for side in case.sides]
            assert len(set(names)) == len(names)
            assert {name for goal in case.goals for name in (goal.side, goal.against)} <= set(names)
            for index, side in enumerate(case.sides):
                assert side.same_size_as in (None, *names[:index])
        sides, goals = memory_cases(size)
        assert {name for goal in goals for name in (goal.side, goal.against)} <= {None, *(side.name for side in sides)}

    def test_goals_are_speeds_of_ours(self, size):
        for case in cases(size):
            packages = {side.name: side.package for side in case.sides}
            assert {packages[goal.side] for goal in case.goals} == {"nested_lm"}


def test_the_c_is_missing_where_it_cannot_be_built(monkeypatch):
    monkeypatch.setattr(cpu_library, "reason_missing", lambda: "there is no compiler")
    case = Case("a", "", (Side("cpu", "nested_lm", "memory", {"backend": "cpu"}),), ())
    workers = Workers(with_peers=False)
    workers.running["nested_lm"] = None  # is not asked
    assert prepare(case, workers) == ({}, {"cpu": "there is no compiler"})


USABLE = [form for form in gate.FORMS.values() if form is not memory_cpu or cpu_library.compiler() is not None]


class TestTheGate:
    rules = tuple(SelfModifying.model_validate(mixer) for mixer in timed_mixers(QUICK))

    def test_lets_the_right_forms_pass(self):
        errors = gate.check(self.rules)
        assert set(errors) == {name for name, form in gate.FORMS.items() if form in USABLE}
        assert max(errors.values()) < gate.AGREEMENT

    @pytest.mark.parametrize("form", USABLE, ids=lambda form: form.__name__.rpartition(".")[2])
    def test_stops_a_wrong_output(self, monkeypatch, form):
        right = form.self_modify

        def wrong(*arguments, **options):
            output = right(*arguments, **options)
            return output._replace(reads=output.reads * (1 + 1e-8))

        monkeypatch.setattr(form, "self_modify", wrong)
        with pytest.raises(SystemExit, match=r"not timed.*e-0[89]"):
            gate.check(self.rules[:1])

    @pytest.mark.parametrize("form", USABLE, ids=lambda form: form.__name__.rpartition(".")[2])
    def test_stops_a_wrong_gradient(self, monkeypatch, form):
        right = form.self_modify

        def wrong(inputs, *arguments, **options):
            half = inputs._replace(key=(inputs.key + inputs.key.detach()) / 2)
            return right(half, *arguments, **options)

        monkeypatch.setattr(form, "self_modify", wrong)
        with pytest.raises(SystemExit, match="not timed"):
            gate.check(self.rules[:1])

    def test_stops_values_that_are_not_numbers(self, monkeypatch):
        right = gate.memory_chunked.self_modify

        def wrong(*arguments, rule, **options):
            output = right(*arguments, rule=rule, **options)
            return output._replace(reads=output.reads * float("nan")) if rule.erase == "input" else output

        monkeypatch.setattr(gate.memory_chunked, "self_modify", wrong)
        with pytest.raises(SystemExit, match="not timed: the chunk form differs from the reference by nan"):
            gate.check(self.rules)


def _timed(side, *, tokens, cpu_s):
    return {"side": side, "package": "nested_lm", "tokens": tokens, "cpu_s": cpu_s, "wall_s": cpu_s}


class TestJudging:
    case = Case("a", "", (), (Goal("G", "fast", "slow", 3.0, 5.0), Goal("H", "fast", "slow")))

    def test_ratio_of_medians_and_range_of_turns(self):
        rows = [_timed("fast", tokens=8, cpu_s=[1.0, 2.0, 4.0]), _timed("slow", tokens=4, cpu_s=[2.0, 4.0, 4.0])]
        goal = report.judged(self.case, rows)["goals"][0]
        assert goal["measured"] == pytest.approx(4.0 / 1.0)
        assert (goal["low"], goal["high"]) == pytest.approx((2.0, 4.0))
        assert goal["met"] is True
        assert goal["stretch_met"] is False

    def test_only_turns_that_both_took_are_compared(self):
        rows = [_timed("fast", tokens=1, cpu_s=[1.0, 9.0]), _timed("slow", tokens=1, cpu_s=[4.0])]
        assert report.judged(self.case, rows)["goals"][0]["measured"] == pytest.approx(4.0)

    def test_a_missed_goal_is_a_miss(self):
        rows = [_timed("fast", tokens=1, cpu_s=[1.0]), _timed("slow", tokens=1, cpu_s=[2.9])]
        goals = report.judged(self.case, rows)["goals"]
        assert goals[0]["met"] is False
        assert goals[1]["met"] is None

    def test_memory(self):
        rows = {"a": {"peak_bytes": 9, "added_bytes": 6}, "b": {"peak_bytes": 8, "added_bytes": 4}}
        assert peak._judged(MemoryGoal("", "a", "b", 1.4), rows)["met"] is False
        assert peak._judged(MemoryGoal("", "a", "b", 1.5), rows)["met"] is True
        assert peak._judged(MemoryGoal("", "a", None, 8), rows)["met"] is False


class TestWorkers:
    def test_an_error_of_a_job_names_it(self):
        with Worker("nested_lm", Path(sys.executable)) as worker:
            with pytest.raises(JobError, match="nested_lm mixer: TypeError"):
                worker.ask("prepare", key="a", job="mixer", precision="highest", arguments={})
            assert worker.ask("stamp")["threads"] == 1

    def test_a_process_that_ended_is_an_error(self):
        with Worker("titans_pytorch", Path(sys.executable)) as worker:  # the package is not in this environment
            worker.process.wait()
            with pytest.raises(JobError, match="ended"):
                worker.ask("stamp")

    def test_a_peer_that_cannot_be_installed_leaves_the_others(self, monkeypatch):
        def no(package):
            raise peers.PeerError(f"no {package}")

        monkeypatch.setattr(peers, "python_of", no)
        with Workers(with_peers=True) as workers:
            assert list(workers.running) == ["nested_lm"]
            case = cases(QUICK)[0]
            rows = take_turns(case, workers, 1)
        assert [row.get("missing") for row in rows] == [None, None, "no nested_learning"]

    def test_ours_may_not_fail(self):
        side = Side("a", "nested_lm", "mixer", {})
        with Workers(with_peers=False) as workers, pytest.raises(JobError):
            prepare(Case("a", "", (side,), ()), workers)

    def test_equal_parameters(self):
        case = next(case for case in cases(QUICK) if case.name == "whole language model")
        with Workers(with_peers=False) as workers:
            ready, _ = prepare(case, workers)
        size = ready["Hope"]["parameters"]
        assert {name for name, side in ready.items() if abs(side["parameters"] / size - 1) > 0.02} == set()
