import re
import xml.etree.ElementTree as ET
from functools import partial

import pytest

from nested_lm.errors import ReportError
from nested_lm_lab.report import plots, plots_continual, plots_inside
from nested_lm_lab.report.collect import collect
from nested_lm_lab.report.plot_style import require_matplotlib, running_mean, short_count, spread
from tests.lab.report.fake_runs import write_campaign

ALL = (
    plots.overview,
    plots.loss,
    plots.validation,
    plots.periods,
    plots.positions,
    plots.passkey,
    partial(plots_continual.matrices, order="forward"),
    plots_continual.forgetting,
    partial(plots_continual.forgetting, every=False),
    plots_inside.gates,
    plots_inside.updates,
    plots_inside.fast_weights,
)


def test_figures_are_whole_and_hold_no_date_or_outside_address(rendered):
    files = sorted((rendered / "figures").glob("*.svg"))
    assert len(files) == len(ALL)
    for path in files:
        text = path.read_text()
        ET.fromstring(text)
        assert not re.search(r"\b20\d\d-\d\d-\d\dT", text)
        assert set(re.findall(r'"(https?://[^"]*)"', text)) <= {
            "http://www.w3.org/2000/svg",
            "http://www.w3.org/1999/xlink",
        }


def test_ids_are_unique_over_the_whole_page(rendered):
    page = (rendered / "report.html").read_text()
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:xlink:href="|url\()#([^")]+)', page)) <= set(ids)


def test_cells_of_the_forgetting_matrix_show_their_values(complete, rendered):
    text = (rendered / "figures" / "continual.svg").read_text()
    for row in complete.runs[2].results["continual"].metrics.forgetting:
        for cell in row:
            assert cell is None or f">{cell.value:.3f}<" in text


def test_a_figure_without_numbers_is_none(tmp_path):
    write_campaign(tmp_path, ("transformer",), tasks=())
    (tmp_path / "runs" / "transformer" / "metrics.jsonl").write_text("")
    campaign = collect(tmp_path)
    assert [plot(campaign) for plot in ALL] == [None] * len(ALL)


@pytest.mark.usefixtures("no_figures")
def test_missing_matplotlib_names_the_extra():
    with pytest.raises(ReportError, match=r"pip install -c constraints.txt -e '.\[plot\]'"):
        require_matplotlib()


def test_running_mean():
    assert running_mean([4.0, 2.0, 0.0, 2.0], 2) == [4.0, 3.0, 1.0, 1.0]


@pytest.mark.parametrize(("value", "text"), [(950, "950"), (4096, "4.1 k"), (1_212_416, "1.21 M"), (0, "0")])
def test_short_count(value, text):
    assert short_count(value) == text


@pytest.mark.parametrize(
    ("wanted", "places"),
    [
        ([0.1, 0.5, 0.9], [0.1, 0.5, 0.9]),
        ([0.5, 0.5, 0.9], [0.45, 0.55, 0.9]),
        ([0.5, 0.5, 0.56], [0.42, 0.52, 0.62]),
        ([], []),
    ],
)
def test_labels_that_would_overlap_are_pushed_apart(wanted, places):
    assert spread(wanted, 0.1) == pytest.approx(places)
