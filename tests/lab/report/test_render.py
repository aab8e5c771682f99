import re
import shutil
from html.parser import HTMLParser

import pytest

from nested_lm_lab.report.document import markdown_block, markdown_text
from nested_lm_lab.report.render import render_campaign
from tests.lab.report.fake_runs import write_campaign

HOSTILE = "</blockquote><script>alert(1)</script> & `````` | {{ 7 * 7 }} <img src=x onerror=alert(2)>\x00\udc80"


class Page(HTMLParser):
    """Tags, and their attributes that load or run something."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for key, value in attributes if key in ("src", "href", "srcset", "data")]
        assert not any(key.startswith("on") for key, _ in attributes)


def test_two_renders_in_two_places_give_the_same_bytes(rendered, tmp_path):
    copy = shutil.copytree(rendered, tmp_path / "elsewhere", ignore=shutil.ignore_patterns("report.*", "figures"))
    render_campaign(copy)
    before, after = (
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (rendered, copy)
    )
    assert before == after


def test_the_page_needs_nothing_from_outside(rendered):
    page = Page((rendered / "report.html").read_text())
    assert not {"script", "link", "iframe", "img", "object"} & set(page.tags)
    links = [address for address in page.addresses if not address.startswith("#")]
    assert links
    assert all((rendered / address).exists() for address in links)
    assert page.tags.count("figure") == 12


def test_the_markdown_report_names_only_figures_that_exist(rendered):
    text = (rendered / "report.md").read_text()
    figures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert len(figures) == 12
    assert all((rendered / name).exists() for name in figures)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in table[:5]} == {8}


@pytest.mark.usefixtures("no_figures")
class TestWithoutMatplotlib:
    def test_reports_are_written_and_say_so(self, tmp_path):
        write_campaign(tmp_path)
        path = render_campaign(tmp_path)
        for name in ("report.html", "report.md"):
            text = (tmp_path / name).read_text()
            assert "There are no figures" in text
            assert "With one seed, Hope has" in text
        assert ".[plot]" in path.read_text()
        assert not (tmp_path / "figures").exists()

    def test_hostile_text_stays_text(self, tmp_path):
        write_campaign(tmp_path, ("hope",), tasks=("sampling",), sample_text=HOSTILE.replace("\udc80", ""))
        text = render_campaign(tmp_path).read_text()
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
        assert "{{ 7 * 7 }}" in text
        assert not {"script", "img"} & set(Page(text).tags)
        markdown = (tmp_path / "report.md").read_text()
        fence = re.search(r"^(`+)text$", markdown, re.MULTILINE).group(1)
        assert len(fence) == 7

    def test_missing_results_are_said_not_invented(self, tmp_path):
        write_campaign(tmp_path, ("hope", "transformer"), tasks=())
        text = render_campaign(tmp_path).read_text()
        assert "has not been evaluated" in text
        assert "not measured" in text
        assert "Passkey</" not in text
        assert "nan" not in text.lower().replace("finance", "")


def test_figures_that_nobody_asked_for_are_not_missed(tmp_path):
    write_campaign(tmp_path, ("transformer",), tasks=("language_modelling",))
    assert "There is no figure" not in render_campaign(tmp_path).read_text()


def test_markdown_text_cannot_break_a_table_or_start_a_tag():
    assert markdown_text("a|b\n<i>*x*") == r"a\|b \<i\>\*x\*"


def test_a_block_cannot_be_closed_from_inside():
    assert markdown_block("a\n````\nb") == "`````text\na\n````\nb\n`````"
