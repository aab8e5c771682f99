"""The table of published audits is what the files say."""

from pathlib import Path

import pytest

from benchmarks import audits
from nested_lm.config.load import config_hash, load_run
from nested_lm_lab.audit.report import Row, load_audit

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "eval" / "audit"


def make_row(value, low=None, high=None, state="passed", reason=""):
    return Row(check="c", figure="f", value=value, low=low, high=high, state=state, reason=reason)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (make_row(0.5, high=2.0), 0.25),
        (make_row(4.0, low=1.0), 0.25),
        (make_row(0.0, high=0.0), 0.0),
        (make_row(1.0, low=0.0, high=1.0), 0.0),
        (make_row(3.0, high=2.0, state="missed"), 1.5),
        (make_row(1.0, high=0.0, state="missed"), 1.0),
        (make_row(None, state="missed", reason="broke"), float("inf")),
        (make_row(None, state="does not apply", reason="none"), 0.0),
    ],
)
def test_closeness_is_a_share_of_the_limit(row, expected):
    assert audits.closeness(row) == expected


def test_the_page_has_the_table_of_the_published_files():
    page = (ROOT / "docs" / "audit.md").read_text()
    _, _, rest = page.partition(audits.MARKERS[0])
    found, end, _ = rest.partition(audits.MARKERS[1])
    assert end, "markers"
    assert found.strip() == audits.table(PUBLISHED), (
        "run python -m benchmarks.audits --out eval/audit --page docs/audit.md"
    )


def test_every_preset_of_the_table_has_a_file():
    files = {str(file.relative_to(PUBLISHED).with_suffix("")) for file in PUBLISHED.rglob("*.json")}
    assert files == set(audits.presets())


@pytest.mark.parametrize("preset", audits.presets())
def test_published_files_are_whole_audits_of_the_model_that_the_preset_has_now(preset):
    audit = load_audit(PUBLISHED / f"{preset}.json")
    assert audit.checks == tuple(audits.CHECKS)
    assert audit.identity.audited_hash == config_hash(load_run(preset).model), "audit it again: --presets, --again"
