"""The page in a browser: no text leaves it or its scrolling box, and texts of a figure do not overlap."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from nested_lm_lab.report.summary import summary_table

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

MEASURE = """
const frame = document.querySelector("iframe"), found = [];
frame.onload = () => {
  const page = frame.contentDocument, wide = frame.clientWidth;
  page.querySelectorAll("details").forEach(one => { one.open = true; });
  if (page.documentElement.scrollWidth > wide) found.push("the page scrolls sideways");
  for (const one of page.querySelectorAll("h1,h2,h3,p,li,summary,figcaption,blockquote,.scroll")) {
    const box = one.getBoundingClientRect();
    if (box.right > wide + 1 || box.left < -1) found.push("leaves the page: " + one.textContent.slice(0, 60));
  }
  for (const svg of page.querySelectorAll("svg")) {
    const outer = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll("text")].map(one => [one.textContent, one.getBoundingClientRect()]);
    texts.forEach(([name, a], place) => {
      if (a.right > outer.right + 2 || a.left < outer.left - 2) found.push("cut off: " + name);
      for (const [other, b] of texts.slice(place + 1)) {
        const x = Math.min(a.right, b.right) - Math.max(a.left, b.left);
        const y = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
        if (x > 3 && y > 0.5 * Math.min(a.height, b.height))
          found.push(svg.getAttribute("aria-label") + ": " + name + " over " + other);
      }
    });
  }
  document.title = JSON.stringify(found);
};
"""


def measured(page: Path, folder: Path, width: int) -> list[str]:
    """What is wrong with a page in a frame of a width, by the browser's own boxes."""
    text = re.sub(r"<meta http-equiv=[^>]*>", "", page.read_text(encoding="utf-8"))
    frame = f'<iframe style="border:0;width:{width}px;height:900px"></iframe>'
    load = "frame.srcdoc = document.querySelector('template').innerHTML;"
    wrapper = folder / f"{width}.html"
    wrapper.write_text(
        f"<!doctype html><meta charset=utf-8><template>{text}</template>{frame}<script>{MEASURE}{load}</script>",
        encoding="utf-8",
    )
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=8000", "--dump-dom"]
    done = subprocess.run(
        [*command, f"--user-data-dir={folder / 'profile'}", "--window-size=1400,1000", wrapper.as_uri()],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    titles = re.findall(r"<title>(\[.*?\])</title>", done.stdout, re.DOTALL)
    assert titles, done.stderr[-2000:]
    found: list[str] = json.loads(html.unescape(titles[0]))
    return found


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_is_cut_off_or_written_over_something_else(rendered, tmp_path, width):
    assert measured(rendered / "report.html", tmp_path, width) == []


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_text_that_leaves_the_page_is_found(tmp_path):
    (tmp_path / "page.html").write_text("<p style='white-space:nowrap'>" + "wide " * 400)
    assert measured(tmp_path / "page.html", tmp_path, 400) == ["the page scrolls sideways"]


def test_the_first_table_has_a_row_an_arm_the_best_first(complete):
    table = summary_table(complete)
    assert [row[0].text for row in table.rows] == ["Hope", "Transformer++", "bigram counts"]
    assert table.header == (
        "arm",
        "bits / byte",
        "needles found",
        "in order of time, bits / byte",
        "parameters",
        "tokens",
        "tokens / s",
    )
    score = complete.runs[0].results["language_modelling"].metrics.window.bits_per_byte
    assert table.rows[0][1].text == f"{score.value:.3f}"
    assert table.rows[0][1].detail == f"{score.low:.3f} to {score.high:.3f}, 1 seed, 14 documents"
