"""Tables of grids: differences over seeds, their reference arms, the paper's rows, and what is refused."""

import pytest

from nested_lm.errors import ReportError
from nested_lm_lab.report.ablations import effects, grid_reports
from nested_lm_lab.report.collect import collect
from nested_lm_lab.report.papers import papers
from nested_lm_lab.report.render import render_campaign
from nested_lm_lab.report.seeds import over_seeds, student
from tests.lab.report.fake_grid import LOSS, bits_of, variant, write_grid

EFFECTS = {"no-k": (0.10, 0.12, 0.11), "slow": (0.05, 0.05, 0.05), "no-dgd": (0.35, 0.05, -0.30)}
VARIANTS = (
    variant("no-k", factor="self-modification", row="w/o inner projection k"),
    variant("slow"),
    variant("no-dgd", against="slow", row="w/o DGD"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_grid(tmp_path_factory.mktemp("grid"), EFFECTS, VARIANTS)


@pytest.mark.parametrize(
    ("freedom", "tabulated"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (29, 2.0452)]
)
def test_quantiles_are_those_of_student(freedom, tabulated):
    assert student(freedom) == pytest.approx(tabulated, abs=0.01)


def test_an_interval_over_seeds():
    found = over_seeds([1.0, 2.0, 3.0])
    half = 4.3027 / 3**0.5
    assert (found.value, found.n) == (2.0, 3)
    assert (found.low, found.high) == (pytest.approx(2 - half, rel=1e-4), pytest.approx(2 + half, rel=1e-4))
    assert over_seeds([4.0]).low is None


def test_differences_are_paired_by_seed_against_the_arm_they_name(folder):
    campaign = collect(folder)
    found = {effect.variant.name: effect for effect in effects(campaign, campaign.manifest.grids[0])}
    base = folder / "runs" / "base-seed1"
    unit = bits_of(1.0, base)
    assert LOSS == 3.6
    for name, reference in (("no-k", None), ("no-dgd", "slow")):
        expected = [a - (EFFECTS[reference][i] if reference else 0) for i, a in enumerate(EFFECTS[name])]
        by_seed = [interval.value for interval in found[name].by_seed.values()]
        assert by_seed == pytest.approx([unit * nats for nats in expected], rel=1e-9)  # offsets of seeds cancel
    assert found["no-k"].verdict == "worse"
    assert found["no-dgd"].verdict == "cannot be told apart"


def test_the_page_has_ours_beside_the_papers(folder):
    path = render_campaign(folder)
    assert path.name == "report.html"
    text = (folder / "report.md").read_text()
    assert "Worse than what they are compared with, over 3 seeds: no-k, slow." in text
    assert "Cannot be told apart, over 3 seeds: no-dgd." in text
    assert "1 of 1 go in the direction that the paper prints" in text
    change = papers().table_6.change("w/o inner projection k")
    assert (change.perplexity, change.accuracy) == (1.53, -1.2)
    assert "+1.53, -1.2 (w/o inner projection k)" in text
    assert r"\(against slow\)" in text or "(against slow)" in text
    assert (folder / "figures" / "grid-differences.svg").exists()
    again = (path.read_bytes(), text)
    render_campaign(folder)
    assert (path.read_bytes(), (folder / "report.md").read_text()) == again


def test_missing_runs_are_said(tmp_path):
    write_grid(tmp_path, {"no-k": (0.1, 0.1, 0.1)}, VARIANTS[:1], missing=("no-k-seed2", "no-k-seed3"))
    (report,) = grid_reports(collect(tmp_path))
    assert report.summary[0] == "Measured with one seed, from which nothing follows: no-k."
    row = report.tables[0][1].rows[-1]
    assert "2 of 3 seeds missing" in row[0].detail
    assert row[4].text == "1 of 1"


def test_a_variant_that_was_never_trained_is_not_dropped(tmp_path):
    missing = tuple(f"no-k-seed{seed}" for seed in (1, 2, 3))
    write_grid(tmp_path, {"no-k": (0.1, 0.1, 0.1)}, VARIANTS[:1], missing=missing)
    (report,) = grid_reports(collect(tmp_path))
    assert report.summary[0] == "Not measured: no-k."
    assert report.tables[0][1].rows[-1][2].text == "not measured"


def test_arms_of_unlike_size_are_refused(tmp_path):
    write_grid(tmp_path, {"no-k": (0.1, 0.1, 0.1)}, VARIANTS[:1], parameters={"no-k": 900_000})
    with pytest.raises(ReportError, match=r"may not share a table(?s:.*)parameters: "):
        grid_reports(collect(tmp_path))


def test_a_variant_that_puts_in_what_a_row_leaves_out_counts_the_other_way(tmp_path):
    put_in = variant("with-q", row="w/o inner projection k", reversed=True)
    write_grid(tmp_path, {"with-q": (-0.1, -0.11, -0.1)}, (put_in,))
    (report,) = grid_reports(collect(tmp_path))
    assert report.summary[0] == "Better, over 3 seeds: with-q."
    assert "1 of 1 go in the direction" in report.summary[1]
