"""Tables over several runs: every arm over its seeds, and the clock sweep."""

from dataclasses import replace

from nested_lm_lab.report.arms import clock_sweep, seeds
from nested_lm_lab.report.kinds import other_results


def seeded(run, seed):
    return replace(run, config=run.config.model_copy(update={"seed": seed}))


def clocked(run, name, *periods):
    """The run again with other levels, whose clocks matter to nobody."""
    model = run.config.model
    level = model.channel.levels[0]
    levels = tuple(level.model_copy(update={"period_tokens": period}) for period in periods)
    changed = model.model_copy(update={"channel": model.channel.model_copy(update={"levels": levels})})
    return replace(run, config=run.config.model_copy(update={"model": changed, "name": name}))


def test_arms_are_averaged_over_seeds_and_paired_by_seed(complete):
    runs = tuple(seeded(run, seed) for seed in (0, 1, 2) for run in complete.runs)
    (shown,) = seeds(replace(complete, runs=runs))
    assert shown.table.header == ("measure", *complete.arms())
    rows = {row[0].text: row[1:] for row in shown.table.rows}
    assert len(rows) == 6
    assert "in order of time: forgetting" in rows
    first, second = rows["bits / byte, test"]
    assert first.detail.endswith("seeds 0, 1, 2")
    assert f"minus {complete.arms()[0]}: " in second.detail
    assert other_results(replace(complete, runs=runs))[0] == shown


def test_one_seed_has_no_such_table(complete):
    assert seeds(complete) == []
    assert clock_sweep(complete) == []


def test_runs_that_differ_in_their_levels_alone_are_a_clock_sweep(complete):
    hope = next(run for run in complete.runs if run.chronological and run.arm == "Hope")
    runs = (
        clocked(hope, "one", 2048),
        clocked(hope, "two", 2048, 4096),
        clocked(hope, "three", 2048, 8192, 32768),
        seeded(clocked(hope, "other", 4096), 7),  # another seed is another sweep
    )
    (shown,) = clock_sweep(replace(complete, runs=runs))
    assert [row[0].detail for row in shown.table.rows] == ["2,048", "2,048, 4,096", "2,048, 8,192, 32,768"]
    assert "Rank correlations" in shown.text or "Too few" in shown.text
