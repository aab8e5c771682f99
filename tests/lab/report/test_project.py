"""The project's documents: from published evidence alone, the same bytes wherever they are written."""

import json
import shutil

import pytest

from nested_lm.errors import ReportError
from nested_lm_lab.report.collect import collect
from nested_lm_lab.report.evidence import publish
from nested_lm_lab.report.kinds import intervals, other_results
from nested_lm_lab.report.project import Folders, write_project
from tests.lab.report.fake_grid import variant, write_grid
from tests.lab.report.fake_runs import write_campaign

NAMES = ["docs/experiments_report.md", "docs/stage2_progress.md", "reports/ablations.md", "reports/dashboard.html"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A project with two published campaigns and one that is half done."""
    root = tmp_path_factory.mktemp("project")
    work = root / "artifacts"
    demo = write_campaign(work / "demo")
    (demo / "runs" / "hope" / "wandb.json").write_text('{"url": "https://wandb.ai/us/demo/runs/1"}')
    metrics = demo / "runs" / "transformer" / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:50]))
    record = demo / "runs" / "transformer" / "run.json"
    commit = json.loads(record.read_text())["commit"]
    record.write_text(record.read_text().replace(commit, f"{commit}-dirty"))
    publish(demo, root / "eval" / "demo")
    grid = write_grid(work / "grid", {"no-k": (0.1, 0.1, 0.1)}, (variant("no-k"),), missing=("no-k-seed3",))
    publish(grid, root / "eval" / "grid")
    write_project(Folders(root))
    return root


def test_the_documents_are_written(root):
    assert sorted(str(path.relative_to(root)) for path in write_project(Folders(root))) == NAMES
    text = (root / "docs/experiments_report.md").read_text()
    assert text.startswith("<!-- Written by `nested-lm report`; changes by hand are lost. -->")
    for words in ("With one seed, Hope", "What is not reproduced", "The papers' numbers", "Worse than"):
        assert words in text
    assert "no result of kind zeroshot has been published; it takes 300 M parameters" in text
    assert "the largest model with a result of kind ablations has 1.21 M parameters; it takes 1 B" in text
    assert "no-k" in (root / "reports/ablations.md").read_text()


def test_the_page_starts_with_one_table_and_says_below_it_what_follows(root):
    text = (root / "docs/experiments_report.md").read_text()
    first, rest = text.split("### What follows")
    assert first.index("| arm | bits / byte |") < first.index("![")
    follows = rest.split("\n###")[0]
    assert "- With one seed, Hope has" in follows
    assert "- Periods in the order of time" in follows
    assert "Needles" not in follows  # nobody measured them
    assert "### Cost" in rest


def test_figures_that_are_named_exist(root):
    import re

    for name in ("docs/experiments_report.md", "reports/ablations.md"):
        figures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", (root / name).read_text())
        assert figures
        assert all(((root / name).parent / figure).exists() for figure in figures)


def test_elsewhere_and_again_the_bytes_are_the_same(root, tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(root / "eval", copy / "eval")  # as in a clean clone: no working folders
    write_project(Folders(copy))
    for name in NAMES:
        assert (copy / name).read_bytes() == (root / name).read_bytes(), name


def test_progress_says_state_and_link_of_every_run(root):
    text = (root / "docs/stage2_progress.md").read_text()
    assert "| hope-demo | finished | 737,280 | 3 | [curves](https://wandb.ai/us/demo/runs/1) |" in text
    assert "| transformer-demo | unfinished |" in text
    assert "| c0ffee123456-dirty |" in text
    assert "| no-k-seed3 | not started |" in text
    assert "3 of 4 runs finished" in text
    assert "## artifacts" not in text


def test_evidence_is_small_and_complete(root):
    run = root / "eval/demo/runs/hope"
    assert {path.name for path in run.iterdir()} == {
        "config.resolved.yaml",
        "run.json",
        "wandb.json",
        "metrics.jsonl",
        "results",
    }
    events = [json.loads(line)["event"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert events.count("step") == 1
    assert events[-1] == "done"
    assert sum(path.stat().st_size for path in run.rglob("*") if path.is_file()) < 60_000


def test_evidence_of_another_campaign_is_not_replaced(root, tmp_path):
    with pytest.raises(ReportError, match="is that of campaign 'grid', not evidence of campaign 'demo'"):
        publish(root / "artifacts/demo", root / "eval/grid")
    (tmp_path / "mine").mkdir()
    with pytest.raises(ReportError, match=r"a folder without campaign\.json"):
        publish(root / "artifacts/demo", tmp_path / "mine")


def test_an_edited_result_is_refused(root, tmp_path):
    shutil.copytree(root / "eval", tmp_path / "eval")
    path = tmp_path / "eval/demo/runs/hope/results/sampling.json"
    path.write_text(path.read_text().replace("Indian", "indian"))
    with pytest.raises(ReportError, match="was changed after it was written"):
        write_project(Folders(tmp_path))
    assert not (tmp_path / "docs").exists()  # nothing half-written


def test_nothing_published_is_said(tmp_path):
    with pytest.raises(ReportError, match=r"no published campaign(?s:.*)--publish"):
        write_project(Folders(tmp_path))


def test_a_kind_without_a_table_is_shown_by_its_intervals_and_named(root):
    campaign = collect(root / "eval/demo")
    assert other_results(campaign) == []
    runs = [run for run in campaign.runs if "continual" in run.results]
    (shown,) = intervals(campaign, runs, "continual")
    assert "Result kind `continual` has no table of its own" in shown.text
    names = [row[0].text for row in shown.table.rows]
    assert names == ["backward transfer", "forward transfer", "plasticity", "accuracy"]  # matrices stay in the files
