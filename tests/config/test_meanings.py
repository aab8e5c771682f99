"""Every setting can be asked for by its path; what is said of it comes from the sections themselves."""

from pathlib import Path

import pytest

from nested_lm.config.meanings import explain_field, meanings, page
from nested_lm.config.train import TrainConfig
from nested_lm.errors import ConfigError

PAGE = Path(__file__).parents[2] / "reports/settings.md"


def said(path):
    return "\n".join(explain_field(path))


def test_a_section_names_its_kinds_and_their_fields():
    text = said("train.schedule")
    assert "a section with `kind` one of cosine, wsd" in text
    assert "wsd: Linear warm-up, constant" in text
    assert "final          0.1  # rate at the end / peak" in text


def test_a_field_has_type_default_and_meaning():
    assert explain_field("train.checkpoints.keep") == [
        "train.checkpoints.keep",
        "  type     a whole number >= 1",
        "  default  2",
        "  meaning  newest ones kept; border checkpoints of a chronological stream are always kept",
    ]


@pytest.mark.parametrize(
    "path", ["model.channel.levels.0.period_tokens", "train.optimizer.muon.rate", "campaign.runner.slurm", "campaign"]
)
def test_lists_kinds_and_other_roots(path):
    assert said(path)


def test_meanings_in_docstrings_are_found():
    assert "share of the rows" in said("train.stream.replay")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("train.schedules", "did you mean `schedule`"),
        ("nothing", "no setting `nothing`"),
        ("seed.x", "the setting before it holds a plain value"),
        ("", "no setting"),
    ],
)
def test_what_is_not_there(path, message):
    with pytest.raises(ConfigError, match=message):
        explain_field(path)


def test_the_page_is_current():
    assert PAGE.read_text(encoding="utf-8") == page(), "run `python -m nested_lm.config.meanings > reports/settings.md`"


def test_a_comment_that_goes_on_below_is_joined():
    assert all(not text.endswith(",") for text in meanings(TrainConfig).values())
