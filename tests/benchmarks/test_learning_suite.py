"""The learning suite as a whole: equal arms, training, result file, tables, and one small run of all tasks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.learning import results, run, training
from benchmarks.learning.arms import MIXERS, configuration
from benchmarks.learning.suite import TASKS
from benchmarks.pages import RESULTS, insert

from nested_lm.nn.sizing import count_parameters

ROOT = Path(__file__).resolve().parents[2]


def row(task="parity", arm="hope", seed=0, diverged_at=None, **measures):
    return {
        "task": task, "arm": arm, "seed": seed, "identity": "x", "commit": "c", "cpu_s": 36.0,
        "hardware": {"processor": "p"}, "diverged_at": diverged_at, "measures": measures,
    }  # fmt: skip


@pytest.mark.parametrize(("vocab", "head_width"), [(4, 16), (128, 16), (256, 64)])
def test_arms_have_nearly_equal_parameters(vocab, head_width):
    sizes = {arm: count_parameters(configuration(arm, vocab, head_width=head_width))["total"] for arm in MIXERS}
    assert max(sizes.values()) <= 1.02 * min(sizes.values()), sizes


def test_rate_warms_up_and_falls_to_the_floor():
    assert training.rate_at(0, 400) == pytest.approx(1 / 20)
    assert training.rate_at(19, 400) == pytest.approx(1.0, abs=0.01)
    assert training.rate_at(200, 400) == pytest.approx(0.5)
    assert training.rate_at(399, 400) == 0.02


def test_a_seed_gives_the_same_cell_and_another_seed_another():
    first, again, other = (
        training.run_cell(TASKS["aa_star"], "linear_attention", seed, steps=3, rows=4) for seed in (0, 0, 1)
    )
    assert (first.measures, first.final_loss) == (again.measures, again.final_loss)
    assert first.final_loss != other.final_loss


def test_a_loss_that_is_not_finite_is_a_result():
    class Broken:
        rate, rates = 1e-3, None

        def build(self, arm, seed):
            return torch.nn.Linear(1, 1)

        def loss(self, model, generator, progress):
            return model.weight.sum() * (float("nan") if progress.share >= 0.5 else 1.0)

    outcome = training.run_cell(Broken(), "any", 0, steps=4, rows=1)
    assert outcome.diverged_at == 2
    assert outcome.measures == {}


def test_interval_by_hand():
    assert results.interval([0.5], bounds=(0.0, 1.0)) == "0.50 (1 seed)"
    # 4.303 * 0.1 / sqrt(3) = 0.248
    assert results.interval([0.4, 0.5, 0.6], bounds=(0.0, 1.0)) == "0.50 (0.25 to 0.75; 3)"
    assert results.interval([0.9, 1.0, 1.0], bounds=(0.0, 1.0)) == "0.97 (0.82 to 1.00; 3)"
    assert results.interval([0.9, 1.0, 1.0]) == "0.97 (0.82 to 1.11; 3)"


def test_identity_changes_with_steps_and_arm():
    task = TASKS["parity"]
    found = {
        results.identity(task, arm, steps, rows) for arm in ("hope", "delta_net") for steps in (1, 2) for rows in (8, 9)
    }
    assert len(found) == 8


def test_settings_that_came_later_leave_a_cell_current():
    task = TASKS["parity"]
    config = task.configuration("hope").model_dump(mode="json")
    del config["mixer"]["flat_gates"]
    older = row() | {"config": config, "identity": results._digest(task.recipe(5, 8), config)}
    assert results.is_current(older, task, 5, 8)
    assert not results.is_current(older, task, 6, 8)
    assert not results.is_current(older | {"arm": "hope_flat"}, task, 5, 8)
    config["mixer"]["chunk"] = 16
    assert not results.is_current(older | {"identity": results._digest(task.recipe(5, 8), config)}, task, 5, 8)


def test_the_best_of_several_rates_counts_and_a_solved_task_ends_its_training():
    class Rates:
        rate, rates = 1e-3, (0.1, 0.5, 0.2)
        solved_below = 0.0

        def build(self, arm, seed):
            layer = torch.nn.Linear(1, 1, bias=False)
            torch.nn.init.constant_(layer.weight, 1.0)
            return layer

        def loss(self, model, generator, progress):
            progress.solved = bool(model.weight < self.solved_below)
            return model.weight.square().sum()

        def measure(self, model, rows):
            return {"weight": model.weight.item()}

    task = Rates()
    outcome = training.run_cell(task, "any", 0, steps=4, rows=1)
    assert (outcome.rate, outcome.trained_steps) == (0.5, 4)
    task.solved_below = 0.999
    outcome = training.run_cell(task, "any", 0, steps=4, rows=1)
    assert (outcome.rate, outcome.trained_steps) == (0.1, 2)


def test_rows_replace_those_of_the_same_cell(tmp_path):
    path = tmp_path / "r.json"
    results.add(path, [row(a=0.1), row(seed=1, a=0.2)])
    results.add(path, [row(a=0.3)])
    assert [(found["seed"], found["measures"]["a"]) for found in results.load(path)] == [(0, 0.3), (1, 0.2)]
    path.write_text(json.dumps({"version": 0, "cells": []}))
    with pytest.raises(SystemExit, match="version 0, this suite writes 1"):
        results.load(path)


def test_table_shows_means_references_and_what_diverged(tmp_path):
    rows = [row(**{"strings@100": 1.0}), row(seed=1, **{"strings@100": 0.5}), row(arm="delta_net", diverged_at=7)]
    tasks = {"Languages": [TASKS["parity"], TASKS["s3"]], "Clocks": [TASKS["clock"]]}
    text = results.tables(tasks, list(MIXERS), rows, tested=64)
    assert "| Arm | parity strings@100 | s3 strings@48 |" in text
    assert "| hope | 0.75 (0.00 to 1.00; 2) | not run |" in text
    assert "| delta_net | 1 diverged | not run |" in text
    assert "| *guessing* | 0.00 | 0.00 |" in text
    assert "hope_flat |" not in text
    assert "Not run: nested_2, chained_2" in text.split("### Clocks")[1]
    page = tmp_path / "page.md"
    page.write_text(f"before\n{RESULTS[0]}\nlast time\n{RESULTS[1]}\nafter\n")
    insert(page, text)
    assert page.read_text().startswith(f"before\n{RESULTS[0]}\n3 cells")
    assert page.read_text().endswith(f"{RESULTS[1]}\nafter\n")
    assert "last time" not in page.read_text()
    page.write_text("no markers")
    with pytest.raises(SystemExit, match="has no place for the tables"):
        insert(page, text)


def test_expected_time_is_that_of_other_seeds():
    parity = TASKS["parity"]
    missing = [(parity, "hope", 1), (parity, "hope", 2), (parity, "delta_net", 0)]
    assert run._expected(missing, [row() | {"cpu_s": 60.0}]) == ", about 2 processor minutes and 1 cells not timed yet"
    assert run._expected([], []) == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "parite"], "'parite' is none of parity"),
        (["--arms", "rnn"], "'rnn' is none of hope"),
        (["--seeds", "11"], "'11' is not a number from 1 to 10"),
        (["--quick"], "--quick needs an --out of its own"),
    ],
)
def test_refuses_wrong_arguments(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    with pytest.raises(SystemExit):
        run.main()
    assert message in capsys.readouterr().err


def test_runs_all_tasks_skips_what_is_there_and_writes_the_page(tmp_path):
    out, page = tmp_path / "r.json", tmp_path / "p.md"
    page.write_text(f"{RESULTS[0]}\n{RESULTS[1]}\n")
    command = [sys.executable, "-m", "benchmarks.learning", "--quick", "--arms", "delta_net,level_1"]
    command += ["--out", str(out), "--page", str(page)]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"{len(TASKS)} of {len(TASKS)} cells to run" in first
    assert f"{len(TASKS)}/{len(TASKS)} clock level_1 seed 0" in first
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert again == f"0 of {len(TASKS)} cells to run\n"
    cells = json.loads(out.read_text())["cells"]
    assert {cell["task"] for cell in cells} == set(TASKS)
    assert all(cell["measures"] and cell["diverged_at"] is None for cell in cells)
    for name in TASKS:
        assert f"- `{name}`: " in page.read_text()


def test_an_interval_of_differences_of_shares_is_not_cut_at_zero():
    values = {"forgetting": [0.0, 0.1, 0.2], "accuracy": [0.0, 0.1, 0.2]}
    stamp = {"task": "increments", "arm": "hope", "diverged_at": None, "cpu_s": 0.0, "commit": "0"}
    stamp["hardware"] = {"processor": "any"}
    rows = [
        stamp | {"seed": seed, "measures": {key: column[seed] for key, column in values.items()}} for seed in range(3)
    ]
    found = results.tables({"Points": [TASKS["increments"]]}, ["hope"], rows, tested=8)
    assert "| hope | 0.10 (0.00 to 0.35; 3) | 0.10 (-0.15 to 0.35; 3) |" in found
