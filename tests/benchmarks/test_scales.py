"""The table of docs/scales.md is what its command would write: all rows in what is cheap, one row in full."""

from pathlib import Path

import pytest

from benchmarks import scales
from nested_lm.config.load import load_run

PAGE = Path(__file__).parents[2] / "docs/scales.md"


@pytest.fixture(scope="module")
def table() -> list[str]:
    """Lines between the markers."""
    _, _, rest = PAGE.read_text().partition(scales.MARKERS[0])
    found, end, _ = rest.partition(scales.MARKERS[1])
    assert end, "markers"
    return found.strip().splitlines()


def test_every_preset_has_a_row_with_its_parameters_and_budget(table):
    assert table[0] == scales.line(scales.HEAD)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]
    assert [cells[0] for cells in rows] == [f"`{name}`" for name in scales.presets()]
    for name, cells in zip(scales.presets(), rows, strict=True):
        exact = scales.exact_cells(load_run(name))
        assert cells[1 : 1 + len(exact)] == exact, f"{name}: run python -m benchmarks.scales --page docs/scales.md"


@pytest.mark.parametrize("name", ["hope/pilot", "baselines/transformer_target"])
def test_a_row_is_what_is_counted_now(name, table):
    assert scales.row(name) in table, "run python -m benchmarks.scales --page docs/scales.md"
